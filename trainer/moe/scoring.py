"""How a router turns its logits into weights, of the experts it chose and of all: the scoring family.

Pinning a router to given experts needs their weights under the *current* logits, so the family is identified by
reproducing a router's own output and refused when nothing reproduces it. Selection biases and groups decide *which*
experts a router chooses and never enter their weights.

Shapes: T tokens, E experts, K chosen experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = 2e-2
"""Largest absolute error accepted when a family reproduces bf16 router weights; fp32 routers are held to 1e-4."""

SLOTS, LEAK = 2, 0.1
"""Experts of a token under sparsemixer, which knows no other number; share of the full softmax that is let in."""
TINY = 1e-20

CHOSEN, ALL = "softmax over chosen experts", "softmax over all experts"
SIGMOID_RENORMALISED, SIGMOID, SPARSEMIXER = "sigmoid, renormalised", "sigmoid", "sparsemixer"


def _softmax(logits_TE: Tensor, index_TK: Tensor, _constant: float) -> Tensor:
    return logits_TE.float().softmax(-1).gather(-1, index_TK)


def _softmax_over_chosen(logits_TE: Tensor, index_TK: Tensor, _constant: float) -> Tensor:
    return logits_TE.float().gather(-1, index_TK).softmax(-1)


def _sigmoid(logits_TE: Tensor, index_TK: Tensor, _constant: float) -> Tensor:
    return logits_TE.float().gather(-1, index_TK).sigmoid()


def _sigmoid_renormalised(logits_TE: Tensor, index_TK: Tensor, epsilon: float) -> Tensor:
    scores_TK = _sigmoid(logits_TE, index_TK, 0.0)
    return scores_TK / (scores_TK.sum(-1, keepdim=True) + epsilon)


def _sparsemixer(logits_TE: Tensor, index_TK: Tensor, jitter: float) -> Tensor:
    """SparseMixer-v2 (GRIN MoE, arXiv:2409.12136, section 3) as in evaluation, for given experts in their order.

    Slot by slot: a softmax over the experts whose logits are within a relative distance 2 x jitter of the best one
    left. A forced expert outside that band joins it, or it would weigh nothing and never get a gradient. Computed in
    the router's own dtype, because rounding decides which experts are in the band.
    """
    left_TE = logits_TE
    weights = []
    for chosen_T1 in index_TK.split(1, dim=-1):
        with torch.no_grad():
            best_T1 = left_TE.max(-1, keepdim=True).values
            distant_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * jitter
            distant_TE = distant_TE.scatter(-1, chosen_T1, False)
        weights.append(left_TE.masked_fill(distant_TE, float("-inf")).softmax(-1).gather(-1, chosen_T1))
        left_TE = left_TE.scatter(-1, chosen_T1, float("-inf"))
    return torch.cat(weights, -1).float()


def _log_sparsemixer(logits_TE: Tensor, jitter: float) -> Tensor:
    """Mean over sparsemixer's slots of each one's distribution, in logarithms; `LEAK` of it is the full softmax."""
    left_TE, slots = logits_TE, []
    for _ in range(SLOTS):
        with torch.no_grad():
            best_T1, chosen_T1 = left_TE.max(-1, keepdim=True)
            distant_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * jitter
        slots.append(left_TE.masked_fill(distant_TE, float("-inf")).softmax(-1))
        left_TE = left_TE.scatter(-1, chosen_T1, float("-inf"))
    return ((1 - LEAK) * torch.stack(slots).mean(0) + LEAK * logits_TE.softmax(-1)).clamp(min=TINY).log()


FAMILIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    # Renormalising a full softmax over the chosen experts equals a softmax over the chosen logits: one family.
    CHOSEN: _softmax_over_chosen,
    ALL: _softmax,
    SIGMOID_RENORMALISED: _sigmoid_renormalised,
    SIGMOID: _sigmoid,
    SPARSEMIXER: _sparsemixer,
}
EPSILONS = (1e-20, 1e-6)
"""What routers add to the sum they renormalise by (deepseek_v3, minimax_m2; lfm2_moe)."""


@dataclass(frozen=True)
class Scoring:
    """A router's scoring family.

    `scale` is its constant factor (DeepSeek's `routed_scaling_factor`, else 1), `constant` the family's own constant
    (the epsilon of renormalised sigmoids, the jitter of sparsemixer), `factor_E` the router's own parameter that
    multiplies each expert's weight (gemma4), by reference.
    """

    family: str
    scale: float
    constant: float = 0.0
    factor_E: Tensor | None = field(default=None, compare=False, repr=False)

    def weights(self, logits_TE: Tensor, index_TK: Tensor) -> Tensor:
        """Weights [T, K] (fp32) of the given experts under the given logits. Differentiable in the logits."""
        weights_TK = self.scale * FAMILIES[self.family](logits_TE, index_TK, self.constant)
        return weights_TK if self.factor_E is None else weights_TK * self.factor_E[index_TK].float()

    def log_distribution(self, logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [T, E] (fp32) of what the family weighs *all* experts by, before it keeps the chosen ones.

        softmax families: the softmax. Sigmoid families: the sigmoids, normalised to sum 1; so a shift of all logits,
        which changes their weights, changes this too. sparsemixer: the mean over its slots of the softmax over the
        experts in the slot's band, beside a little of the full softmax, without which a divergence could be infinite.

        Selection biases and groups are left out, as they are of the weights: they decide who is chosen, by the same
        numbers whatever the prompt is (what they make of it is the flip rate's business). Differentiable.

        Args:
            temperature: divides the logits first.
        """
        logits_TE = logits_TE.float() / temperature
        if self.family in (SIGMOID, SIGMOID_RENORMALISED):
            scores_TE = torch.nn.functional.logsigmoid(logits_TE)
            return scores_TE - scores_TE.logsumexp(-1, keepdim=True)
        if self.family == SPARSEMIXER:
            return _log_sparsemixer(logits_TE, self.constant)
        return logits_TE.log_softmax(-1)

    @property
    def shift_invariant(self) -> bool:
        """Whether adding one constant to all logits of a token changes no weight: true of the softmax families."""
        return self.family in (CHOSEN, ALL)


def identify(
    logits_TE: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    *,
    declared_scale: float = 1.0,
    jitter: float | None = None,
    factor_E: Tensor | None = None,
) -> Scoring | None:
    """Find the family that reproduces a router's own weights best, or None when none does.

    Args:
        declared_scale: the factor that the router's attributes name, taken when the measured one is near it. The
            measured one is the median ratio, so that one rounding outlier does not decide it.
        jitter: of a router that declares one; without it sparsemixer is not tried.
        factor_E: the router's own factor of each expert, if it has one.
    """
    exact = weights_TK.dtype == logits_TE.dtype == torch.float32
    logits_TE, theirs_TK = logits_TE.detach(), weights_TK.detach().float()
    constants = {SIGMOID_RENORMALISED: EPSILONS, SPARSEMIXER: () if jitter is None else (jitter,)}
    candidates = [(family, constant) for family in FAMILIES for constant in constants.get(family, (0.0,))]
    best, smallest = None, float("inf")
    for family, constant in candidates:
        unscaled_TK = Scoring(family, 1.0, constant, factor_E).weights(logits_TE, index_TK).detach()
        scale = (theirs_TK / unscaled_TK.clamp(min=1e-12)).median().item()
        scale = next((s for s in (1.0, declared_scale) if abs(scale - s) < 1e-2 * abs(s)), scale)
        error = (scale * unscaled_TK - theirs_TK).abs().max().item()
        if error <= (1e-4 if exact else TOLERANCE) * max(1.0, abs(scale)) and error < smallest:
            best, smallest = Scoring(family, scale, constant, factor_E), error
    return best
