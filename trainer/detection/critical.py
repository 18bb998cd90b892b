"""The critical experts: from pairs and counts to an ExpertSet, with its stability and a control for topic.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.detection.counts import Counts, count_activations
from trainer.detection.pairs import Pair
from trainer.detection.saliency import gradient_saliency
from trainer.detection.scores import score, stability
from trainer.detection.selection import top_k
from trainer.model.chat import Chat
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.recipe.sections import DetectSection


@dataclass(frozen=True)
class Scores:
    """Scores as a function of the sample: `of(rows)` is [L, E] on rows, repeats allowed, of `size` pairs.

    `shared`: layer index -> the same score of its shared expert, where the score can tell (`saliency`).
    """

    of: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    size: int
    shared: dict[int, float] = field(default_factory=dict)

    def all(self) -> NDArray[np.float64]:
        """The scores on the whole sample, [L, E]."""
        return self.of(np.arange(self.size))


def scoring(
    backbone: Backbone,
    chat: Chat,
    pairs: Sequence[Pair],
    counts: Counts,
    section: DetectSection,
) -> Scores:
    """The score that the section names: from the counts, or from gradients (`saliency`)."""
    kind = section.score
    if kind == "saliency":
        norms_MLE, shared_ML = gradient_saliency(backbone, chat, pairs, section.batch_size)
        shared_L = dict(zip(counts.layers, shared_ML.mean(0).tolist(), strict=True))
        shared = {layer: shared_L[layer] for layer in backbone.shared_layers}
        return Scores(lambda rows: norms_MLE[rows].mean(0), len(norms_MLE), shared)
    return Scores(lambda rows: score(counts.take(rows), kind, section.pool), len(counts))


def select(scores: Scores, counts: Counts, k: int, section: DetectSection, seed: int) -> ExpertSet:
    """The sorted global top-K of the scores, or the matched random set when the section asks for the control."""
    scores_LE, cap = scores.all(), section.per_layer_cap
    stability_LE = stability(scores.of, scores.size, counts.experts, k, cap, section.bootstrap, seed)
    members = [
        Member(counts.layers[i], e, float(scores_LE[i, e]), float(stability_LE[i, e]) if section.bootstrap else None)
        for i, e in top_k(scores_LE, counts.experts, k, cap)
    ]
    experts = ExpertSet(tuple(members), dict(zip(counts.layers, counts.experts, strict=True)))
    return experts.random_like(seed) if section.selection == "random" else experts


class TopicControl(NamedTuple):
    """Mean risk difference of the selected experts: as measured, and with the same refusal after both prompts."""

    difference: float
    with_equal_replies: float


def topic_control(
    backbone: Backbone,
    chat: Chat,
    pairs: Sequence[Pair],
    counts: Counts,
    experts: ExpertSet,
    section: DetectSection,
) -> TopicControl:
    """How much of the critical experts' difference remains when both sides of a pair end in the same refusal.

    Routing follows topic more than safety (arXiv 2605.29708). What remains is due to the prompt, the jailbreak's words
    and topic, not to the model complying.
    """
    equal = [replace(pair, adversarial_reply=pair.anchor_reply) for pair in pairs]
    control = count_activations(backbone, chat, equal, section.tokens, section.batch_size)
    rows = {layer: i for i, layer in enumerate(counts.layers)}

    def mean_difference(of: Counts) -> float:
        scores_LE = score(of, "risk_difference", "token")
        return float(np.mean([scores_LE[rows[m.layer], m.expert] for m in experts]))

    return TopicControl(mean_difference(counts), mean_difference(control))
