"""What SteerMoE needs around its steps, for the method itself and as a baseline beside another one.

Nothing here writes a checkpoint: a model is steered in memory while it is measured, and is itself again afterwards.

Shapes: B sequences, S positions, V vocabulary, T tokens, K chosen experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.detection import contrasts
from trainer.detection.gate import fit_gate
from trainer.detection.pairs import PairReport, build_pairs
from trainer.detection.ranking import Ranking, Selection, rank
from trainer.detection.tables import check_model, load_table
from trainer.engines.table import names
from trainer.model.chat import batches
from trainer.model.reply import Reply
from trainer.moe.routing import flip_rate, record
from trainer.moe.steering import Steering, applied, steer
from trainer.moe.steering_gate import Gate
from trainer.pipeline.experiment import Experiment
from trainer.recipe.sections import PairsSection
from trainer.recipe.steer import SteerSection


@dataclass(frozen=True)
class Detected:
    """Activation counts (columns of `activations.parquet`), their ranking, and the rows of `pairs.jsonl`."""

    table: pd.DataFrame
    ranking: Ranking
    pairs: PairReport


def detect_experts(experiment: Experiment[Any], section: SteerSection, asked: PairsSection) -> Detected:
    """Count and rank as the section says; `asked`: how the model is asked for its replies.

    Raises:
        UserError: no usable pair, a file that does not fit, a span that is not found; names key, file or pair.
    """
    report = PairReport()
    if section.table is not None:
        table = load_table(Path(section.table))
        check_model(table, sizes(experiment), top_k(experiment), section.table)
        table["delta"] = table.a1 / (table.a1 + table.d1) - table.a2 / (table.a2 + table.d2)
        table["score"] = -table.delta
        return Detected(table, rank(table, reverse=section.reverse), report)
    found = _contrasts(experiment, section, asked, report)
    counts = contrasts.count_contrasts(experiment.backbone, experiment.chat, found, asked.batch_size)
    table = contrasts.activation_table(counts)
    return Detected(table, rank(table, reverse=section.reverse), report)


def _contrasts(
    experiment: Experiment[Any], section: SteerSection, asked: PairsSection, report: PairReport
) -> list[contrasts.Contrast]:
    tokenizer, limit = experiment.chat, asked.max_pairs
    if section.contrast != "safety":
        read = contrasts.faithfulness if section.contrast == "faithfulness" else contrasts.custom
        found = read(tokenizer, Path(str(section.pairs)))[:limit]
        report.rows += [{"pair": contrast.id, "outcome": "kept"} for contrast in found]
        return found
    goals = experiment.corpus.harmful.train
    if section.unsafe == "answer":
        found = contrasts.safety_from_answers(tokenizer, goals[:limit], str(section.refusal))
        report.rows += [{"goal": contrast.id, "outcome": "kept"} for contrast in found]
        return found
    wrappers, ask = experiment.corpus.wrappers_of("seen"), partial(experiment.ask, section=asked)
    built = build_pairs(goals, wrappers, ask, experiment.judge, limit, asked.tries_per_pair)
    report.rows, report.pairs = built.rows, built.pairs
    return contrasts.safety(tokenizer, built.pairs, section.refusal)


def selected(
    experiment: Experiment[Any],
    section: SteerSection,
    ranking: Ranking,
    n_pos: int,
    n_neg: int,
    *,
    bottom: bool = False,
) -> Selection:
    """A+ and A- of the ranking's top, or of its bottom (the control)."""
    choose = ranking.bottom if bottom else ranking.select
    return choose(n_pos, n_neg, top_k(experiment), section.per_layer_cap)


def gate_of(experiment: Experiment[Any], asked: PairsSection) -> Gate:
    """The gate, fitted on training prompts: harmful and harmless, each plain and in the wrappers of training."""
    corpus, limit = experiment.corpus, asked.max_pairs
    wrappers = [*corpus.wrappers_of("seen"), *corpus.wrappers_of("robust")]
    sources = ([corpus.harmful.train], [corpus.benign.train, corpus.borderline.train])
    kinds = []
    for parts in sources:
        prompts = [prompt for part in parts for prompt in part[:limit]]
        plain = [(prompt.id, prompt.conversation) for prompt in prompts]
        wrapped = [(p.id, wrappers[i % len(wrappers)].wrap(p.conversation)) for i, p in enumerate(prompts)]
        kinds.append(plain + wrapped)
    return fit_gate(experiment.backbone, experiment.chat, kinds[0], kinds[1], asked.batch_size)


def steering(experiment: Experiment[Any], how: Steering, gate: Gate | None = None) -> AbstractContextManager[None]:
    """`steer` on the experiment's model. `UserError` for a gate on a sharded model, which it cannot run alone."""
    if gate and experiment.engine.capabilities.splits_parameters:
        others = ", ".join(names(lambda e: not e.splits_parameters))
        raise UserError(f"steer.gate: not available under {experiment.engine.name}; allowed: {others}")
    return steer(experiment.backbone, how, gate)


# --- figures --------------------------------------------------------------------------------------


@torch.no_grad()
def proof(experiment: Experiment[Any], how: Steering, prompts: Sequence[Conversation]) -> dict[str, Any]:
    """What the steering did to the routing of `prompts`, from recorded indices.

    `topk_flip_rate`: share of the routers' own choices that were replaced, mean over layers. `forced`: whether every
    activated expert ran on every token and no deactivated one on any. `tokens_changed`: for each named expert the
    share of tokens whose router had decided otherwise.
    """
    turns = [experiment.chat.encode(prompt, Reply.written("")) for prompt in prompts]
    ((_, batch),) = batches(turns, experiment.chat.padding, len(turns))
    batch = batch.to(experiment.model.device)
    inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
    real_T = batch.attention_mask_BS.bool().reshape(-1)
    with steering(experiment, how), record(experiment.backbone) as own, applied(experiment.backbone) as ran:
        experiment.model(**inputs, use_cache=False)
    before = {index: own.index_TK[index][real_T] for index in ran}
    after = {index: indices[-1][real_T] for index, indices in ran.items()}
    changed, forced = [], True
    for experts, wanted in ((how.activate, True), (how.deactivate, False)):
        for layer, members in experts.items():
            for expert in members:
                now_T = (after[layer] == expert).any(-1)
                forced &= bool((now_T == wanted).all())
                share = float(((before[layer] == expert).any(-1) != now_T).float().mean())
                changed.append({"layer": layer, "expert": expert, "active": wanted, "share": round(share, 4)})
    flips = [flip_rate(before[index], after[index]) for index in ran]
    return {"topk_flip_rate": sum(flips) / len(flips), "forced": forced, "tokens_changed": changed}


@torch.no_grad()
def perplexity(
    experiment: Experiment[Any],
    asked: PairsSection,
    how: Steering | None,
    gate: Gate | None,
    prompts: Sequence[Conversation],
) -> float:
    """Perplexity under the original model of the replies that the steered model (None: itself) gives to `prompts`.

    Per token, the end of the reply included.
    """
    ask = partial(experiment.ask, section=asked)
    if how is None:
        replies = ask(prompts, "fluency")
    else:
        with steering(experiment, how, gate):
            replies = ask(prompts, "fluency")
    turns = [experiment.chat.encode(*turn) for turn in zip(prompts, replies, strict=True)]
    total, tokens = 0.0, 0
    for _, batch in batches(turns, experiment.chat.padding, experiment.recipe.evaluate.batch_size):
        batch = batch.to(experiment.model.device)
        logits_BSV = experiment.model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        ).logits
        loss_BS = F.cross_entropy(
            logits_BSV[:, :-1].transpose(1, 2).float(), batch.input_ids_BS[:, 1:], reduction="none"
        )
        mask_BS = batch.response_BS[:, 1:]
        total += float((loss_BS.double() * mask_BS).sum())
        tokens += int(mask_BS.sum())
    return math.exp(total / tokens)


def sizes(experiment: Experiment[Any]) -> dict[int, int]:
    """Number of routed experts by decoder layer."""
    return {layer.index: layer.num_experts for layer in experiment.backbone}


def top_k(experiment: Experiment[Any]) -> dict[int, int]:
    """Experts chosen per token by decoder layer."""
    return {layer.index: layer.top_k for layer in experiment.backbone}
