"""RASA, step 1: pairs, activation counts, scores, top-K. Kept in the run folder; adversarial replies are not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from data_prep.recombine import recombine
from data_prep.schema import Wrapper
from trainer.detection.counts import Counts, count_activations
from trainer.detection.critical import scoring, select, topic_control
from trainer.detection.pairs import PairReport, build_pairs, read_pairs
from trainer.detection.selection import resolve_k
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.model.reply import Reply
from trainer.moe.expert_set import ExpertSet
from trainer.pipeline.detected import EXPERT_SET, FILES, write_detected
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.runtime.console import say
from trainer.runtime.files import atomic_write
from trainer.training.rows import Target


@dataclass(frozen=True)
class Critical:
    """The critical experts, the jailbreaks that showed them and the refusals (by goal) they should have met."""

    experts: ExpertSet
    targets: list[Target]
    refusals: dict[str, Reply]


@dataclass(frozen=True)
class Found:
    """What is written: nothing of it is an adversarial text."""

    pairs: PairReport
    counts: Counts
    scores_LE: NDArray[np.float64]
    experts: ExpertSet


def identify(experiment: Experiment[RasaRecipe]) -> Step[Critical]:
    """The critical experts of the experiment's model.

    Raises:
        UserError: the model refuses nothing, no jailbreak works, or `detect.top_k` does not fit the model.
    """
    detect = experiment.recipe.detect
    sizes = [layer.num_experts for layer in experiment.backbone]
    k = resolve_k(detect.top_k, sum(sizes), detect.per_layer_cap, len(sizes))
    wrappers = jailbreaks(experiment)
    pairs, *_ = files = [experiment.folder / name for name in ("pairs.jsonl", *FILES)]

    def write(found: Found) -> None:
        atomic_write(pairs, found.pairs.jsonl())
        write_detected(experiment.folder, found.counts.scored(found.scores_LE), found.experts)

    def read() -> Critical:
        goals = {goal.id: goal for goal in experiment.corpus.harmful.train}
        by_id = {wrapper.id: wrapper for wrapper in wrappers}
        refusals, kept = read_pairs(pairs)
        targets = [Target(goals[goal], by_id[wrapper], refusals[goal]) for goal, wrapper in kept]
        return Critical(ExpertSet.load(experiment.folder / EXPERT_SET), targets, refusals)

    return experiment.step(
        "detect",
        lambda: _find(experiment, wrappers, k),
        Kept(write, lambda: files, read),
        reads=["detect", "evaluate.judge", "evaluate.refusal_markers"],
    )


def _find(experiment: Experiment[RasaRecipe], wrappers: list[Wrapper], k: int) -> Found:
    recipe, backbone, chat = experiment.recipe, experiment.backbone, experiment.chat
    detect = recipe.detect
    ask = partial(experiment.ask, section=detect)
    goals = experiment.corpus.harmful.train
    report = build_pairs(goals, wrappers, ask, experiment.judge, detect.max_pairs, detect.tries_per_pair)
    counts = count_activations(backbone, chat, report.pairs, detect.tokens, detect.batch_size)
    scores = scoring(backbone, chat, report.pairs, counts, detect)
    experts = select(scores, counts, k, detect, recipe.run.seed)
    control = topic_control(backbone, chat, report.pairs, counts, experts, detect)
    about: dict[str, object] = {
        "score": detect.score,
        "tokens": detect.tokens,
        "topic_control": control._asdict(),
    }
    if scores.shared:
        about["shared_experts"] = scores.shared
    experts = replace(experts, model=recipe.model.name_or_path, about=experts.about | about)
    if detect.shared_experts:
        experts = experts.with_shared(backbone.shared_layers)
    also = f" and the shared experts of {len(experts.shared)} layers" if experts.shared else ""
    say(
        f"detect: {len(report.pairs)} pairs kept; {len(experts)} of {experts.total} experts{also} selected; their "
        f"mean activation difference is {control.difference:.3f}, with equal replies {control.with_equal_replies:.3f}"
    )
    if scores.shared:
        routed = sum(member.score for member in experts) / len(experts)
        mean = sum(scores.shared.values()) / len(scores.shared)
        say(f"detect: mean saliency of a shared expert {mean:.3g}, of a selected one {routed:.3g}")
    return Found(report, counts, scores.all(), experts)


def jailbreaks(experiment: Experiment[RasaRecipe]) -> list[Wrapper]:
    """The seen wrappers, with recombined ones between them so that these make up their share of the pairs."""
    detect, corpus = experiment.recipe.detect, experiment.corpus
    seen = corpus.wrappers_of("seen")
    if detect.recombined == 0:
        return seen
    contexts = [prompt.text for prompt in corpus.benign.train]
    places = [int((i + 1) * detect.recombined) > int(i * detect.recombined) for i in range(detect.max_pairs)]
    known = [*seen, *corpus.wrappers_of("robust")]
    made = iter(recombine(known, contexts, sum(places), experiment.recipe.run.seed))
    turns = cycle(seen)
    return [next(made if place else turns) for place in places]
