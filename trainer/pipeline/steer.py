"""What SteerMoE needs around its steps, for the method itself and as a baseline beside another one.

Nothing here writes a checkpoint: a model is steered in memory while it is measured, and is itself again afterwards.

Shapes: B sequences, S positions, V vocabulary, T tokens, K chosen experts per token.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from data_prep.schema import Split
from trainer.detection import contrasts
from trainer.detection.gate import fit_gate
from trainer.detection.pairs import PairReport, build_pairs
from trainer.detection.ranking import Ranking, Selection, rank
from trainer.detection.tables import check_model, load_table
from trainer.evaluation.suite import Suite
from trainer.model.chat import batches, encode, pad_id
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.routing import flip_rate, record
from trainer.moe.steering import Steering, applied, steer
from trainer.moe.steering_gate import Gate
from trainer.pipeline.experiment import Subject
from trainer.run.folder import Run, Stage
from trainer.runtime.console import say

RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Detected:
    """Activation counts (columns of `activations.parquet`), their ranking, and the rows of `pairs.jsonl`."""

    table: pd.DataFrame
    ranking: Ranking
    pairs: PairReport


def detect_experts(subject: Subject) -> Detected:
    """Count and rank as the recipe's `steer` section says.

    Raises:
        UserError: no usable pair, a file that does not fit, a span that is not found; names key, file or pair.
    """
    section = subject.recipe.steer
    report = PairReport()
    if section.table is not None:
        table = load_table(Path(section.table))
        check_model(table, sizes(subject), top_k(subject), section.table)
        table["delta"] = table.a1 / (table.a1 + table.d1) - table.a2 / (table.a2 + table.d2)
        table["score"] = -table.delta
        return Detected(table, rank(table, reverse=section.reverse), report)
    found = _contrasts(subject, report)
    counts = contrasts.count_contrasts(subject.backbone, subject.tokenizer, found, subject.recipe.detect.batch_size)
    table = contrasts.activation_table(counts)
    return Detected(table, rank(table, reverse=section.reverse), report)


def _contrasts(subject: Subject, report: PairReport) -> list[contrasts.Contrast]:
    section, tokenizer, limit = subject.recipe.steer, subject.tokenizer, subject.recipe.detect.max_pairs
    if section.contrast != "safety":
        read = contrasts.faithfulness if section.contrast == "faithfulness" else contrasts.custom
        found = read(tokenizer, Path(str(section.pairs)))[:limit]
        report.rows += [{"pair": contrast.id, "outcome": "kept"} for contrast in found]
        return found
    goals = subject.corpus.harmful.train
    if section.unsafe == "answer":
        found = contrasts.safety_from_answers(tokenizer, goals[:limit], str(section.refusal))
        report.rows += [{"goal": contrast.id, "outcome": "kept"} for contrast in found]
        return found
    built = build_pairs(
        goals, subject.corpus.wrappers_of("seen"), subject.replies_of(subject.model), subject.judge, limit
    )
    report.rows, report.pairs = built.rows, built.pairs
    return contrasts.safety(tokenizer, built.pairs, section.refusal)


def selected(subject: Subject, ranking: Ranking, n_pos: int, n_neg: int, *, bottom: bool = False) -> Selection:
    """A+ and A- of the ranking's top, or of its bottom (the control)."""
    choose = ranking.bottom if bottom else ranking.select
    return choose(n_pos, n_neg, top_k(subject), subject.recipe.steer.per_layer_cap)


def gate_of(subject: Subject) -> Gate:
    """The gate, fitted on training prompts: harmful and harmless, each plain and in the wrappers of training."""
    corpus, limit = subject.corpus, subject.recipe.detect.max_pairs
    wrappers = [*corpus.wrappers_of("seen"), *corpus.wrappers_of("robust")]
    sources = ([corpus.harmful.train], [corpus.benign.train, corpus.borderline.train])
    kinds = []
    for parts in sources:
        prompts = [prompt for part in parts for prompt in part[:limit]]
        plain = [(prompt.id, prompt.text) for prompt in prompts]
        wrapped = [(p.id, wrappers[i % len(wrappers)].wrap(p.text)) for i, p in enumerate(prompts)]
        kinds.append(plain + wrapped)
    return fit_gate(subject.backbone, subject.tokenizer, kinds[0], kinds[1], subject.recipe.detect.batch_size)


def steering(subject: Subject, how: Steering, gate: Gate | None = None) -> AbstractContextManager[None]:
    """`steer` on the subject's model. `UserError` for a gate on a sharded model, whose parts it cannot run alone."""
    if gate and subject.engine.shards:
        raise UserError(f"steer.gate: not available under {subject.engine.name}; use ddp, zero1 or zero2")
    return steer(subject.backbone, how, gate)


# --- figures --------------------------------------------------------------------------------------


@torch.no_grad()
def proof(subject: Subject, how: Steering, prompts: Sequence[str]) -> dict[str, Any]:
    """What the steering did to the routing of `prompts`, from recorded indices.

    `topk_flip_rate`: share of the routers' own choices that were replaced, mean over layers. `forced`: whether every
    activated expert ran on every token and no deactivated one on any. `tokens_changed`: for each named expert the
    share of tokens whose router had decided otherwise.
    """
    turns = [encode(subject.tokenizer, prompt, "") for prompt in prompts]
    ((_, batch),) = batches(turns, pad_id(subject.tokenizer), len(turns))
    batch = batch.to(subject.model.device)
    inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
    real_T = batch.attention_mask_BS.bool().reshape(-1)
    with steering(subject, how), record(subject.backbone) as own, applied(subject.backbone) as ran:
        subject.model(**inputs, use_cache=False)
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
def perplexity(subject: Subject, how: Steering | None, gate: Gate | None, prompts: Sequence[str]) -> float:
    """Perplexity under the original model of the replies that the steered model (None: itself) gives to `prompts`.

    Per token, the end of the reply included.
    """
    ask = subject.replies_of(subject.model)
    if how is None:
        replies = ask(prompts, "fluency")
    else:
        with steering(subject, how, gate):
            replies = ask(prompts, "fluency")
    turns = [encode(subject.tokenizer, *turn) for turn in zip(prompts, replies, strict=True)]
    total, tokens = 0.0, 0
    for _, batch in batches(turns, pad_id(subject.tokenizer), subject.recipe.evaluate.batch_size):
        batch = batch.to(subject.model.device)
        logits_BSV = subject.model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        ).logits
        loss_BS = F.cross_entropy(
            logits_BSV[:, :-1].transpose(1, 2).float(), batch.input_ids_BS[:, 1:], reduction="none"
        )
        mask_BS = batch.response_BS[:, 1:]
        total += float((loss_BS.double() * mask_BS).sum())
        tokens += int(mask_BS.sum())
    return math.exp(total / tokens)


def smaller(suite: Suite, prompts: int) -> Suite:
    """The same questions on the first `prompts` test prompts of each kind, without capability."""

    def first(split: Split) -> Split:
        return Split(split.train, split.test[:prompts])

    whole = suite.corpus
    corpus = replace(
        whole, harmful=first(whole.harmful), benign=first(whole.benign), borderline=first(whole.borderline)
    )
    return Suite(
        corpus,
        suite.judge,
        max_new_tokens=suite.max_new_tokens,
        batch_size=suite.batch_size,
        capability=False,
        wraps_per_benign=suite.wraps_per_benign,
    )


def random_steering(subject: Subject, how: Steering, seed: int) -> Steering:
    """As many experts forced in and out in every layer, drawn from the experts that `how` leaves alone."""
    named = [(layer, e) for experts in (how.activate, how.deactivate) for layer in experts for e in experts[layer]]
    drawn = ExpertSet(tuple(Member(*pair) for pair in sorted(named)), sizes(subject)).random_like(seed).by_layer()
    generator = random.Random(seed)
    on: dict[int, tuple[int, ...]] = {}
    off: dict[int, tuple[int, ...]] = {}
    for layer, experts in drawn.items():
        shuffled = generator.sample(experts, len(experts))
        count = len(how.activate.get(layer, ()))
        on[layer], off[layer] = tuple(shuffled[:count]), tuple(shuffled[count:])
    return replace(how, activate=on, deactivate=off)


def controls(run: Run, subject: Subject, ranking: Ranking, how: Steering, after: Sequence[Stage]) -> dict[str, Any]:
    """Attack success under random sets and under the ranking's bottom, as many experts as `how` forces; ungated."""
    stage = run.stage("controls", subject.hash("steer", "evaluate"), after=after)
    path = run.dir / "stages" / "controls" / "metrics.json"
    if not stage.done:
        section = subject.recipe.steer
        sets = {f"random {i}": random_steering(subject, how, subject.recipe.run.seed + i) for i in range(RANDOM_DRAWS)}
        lowest = selected(subject, ranking, section.n_pos, section.n_neg, bottom=True)
        sets["bottom"] = lowest.steering(section.strength)
        found = {}
        for name, other in sets.items():
            with steering(subject, other):
                found[name] = subject.suite.measure_asr(
                    subject.model, subject.tokenizer, ("seen", "unseen"), label=f"control: {name}"
                )
        result = {
            "random_control": found["random 0"],
            "random_draws": [found[f"random {i}"] for i in range(RANDOM_DRAWS)],
            "bottom_control": found["bottom"],
        }
        stage.finish_json(path, result)
    metrics: dict[str, Any] = json.loads(path.read_text())
    return metrics


def sweep(
    run: Run, subject: Subject, ranking: Ranking, gate: Gate | None, after: Sequence[Stage]
) -> list[dict[str, Any]]:
    """The settings of `steer.sweep`, each ungated and, with a gate, gated: safety, over-refusal, fluency."""
    stage = run.stage("sweep", subject.hash("steer", "evaluate"), after=after)
    path = run.dir / "stages" / "sweep" / "metrics.json"
    section = subject.recipe.steer
    if not stage.done:
        suite = smaller(subject.suite, section.sweep.prompts)
        prompts = [prompt.text for prompt in suite.corpus.benign.test]
        found = []
        for setting in _settings(subject):
            for gated in (False, True) if gate else (False,):
                name = ", ".join(f"{key} {value}" for key, value in setting.items()) + (", gated" if gated else "")
                try:
                    how = selected(subject, ranking, setting["n_pos"], setting["n_neg"]).steering(setting["strength"])
                    with steering(subject, how, gate if gated else None):
                        metrics = suite.measure(subject.model, subject.tokenizer, label=f"sweep: {name}").metrics
                    fluency = perplexity(subject, how, gate if gated else None, prompts)
                except ValueError as error:
                    say(f"sweep: {name}: left out: {error}")
                    found.append({**setting, "gated": gated, "impossible": str(error)})
                    continue
                found.append({**setting, "gated": gated, "metrics": metrics, "perplexity": fluency})
        stage.finish_json(path, found)
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def _settings(subject: Subject) -> list[dict[str, Any]]:
    section = subject.recipe.steer
    chosen: dict[str, Any] = {"n_pos": section.n_pos, "n_neg": section.n_neg, "strength": section.strength}
    settings = []
    for key in chosen:
        settings += [{**chosen, key: value} for value in getattr(section.sweep, key)]
    unique = {tuple(setting.values()): setting for setting in settings}
    return list(unique.values())


def steering_baseline(run: Run, subject: Subject, after: Sequence[Stage] = ()) -> dict[str, Any]:
    """SteerMoE by the recipe's `steer` section beside another method: the contract's M, ungated.

    `subject.model` must be the original model. Goes into `evaluation.json` as `diagnostics.steering_baseline`.
    """
    stage = run.stage("steering-baseline", subject.hash("detect", "steer", "evaluate"), after=after)
    path = run.dir / "stages" / "steering-baseline" / "metrics.json"
    if not stage.done:
        section = subject.recipe.steer
        ranking = detect_experts(subject).ranking
        selection = selected(subject, ranking, section.n_pos, section.n_neg)
        with steering(subject, selection.steering(section.strength)):
            metrics = subject.suite.measure(subject.model, subject.tokenizer, label="steering baseline").metrics
        stage.finish_json(path, metrics)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def sizes(subject: Subject) -> dict[int, int]:
    """Number of routed experts by decoder layer."""
    return {layer.index: layer.num_experts for layer in subject.backbone}


def top_k(subject: Subject) -> dict[int, int]:
    """Experts chosen per token by decoder layer."""
    return {layer.index: layer.top_k for layer in subject.backbone}
