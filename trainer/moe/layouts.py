"""Where model families depart from the common module contract: the only place that names classes.

Everything else about a family is read from its modules or found numerically by `Backbone.check`. Read in
transformers 5.23; an entry can go when upstream's class follows the contract.

Shapes: T tokens, E experts, K chosen experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp", "mlp")
"""Names of the always-active expert beside the routed ones. `mlp` is gemma4's: its router and experts sit in the
decoder layer itself, beside a dense MLP whose output is added to theirs."""

TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts")
"""Where a configuration says top-k when the router does not."""

SELECTION_ONLY = ("e_score_correction_bias", "expert_bias")
"""Router parameters that decide which experts are chosen and nothing else: no gradient can reach them. ernie4_5_moe
holds its selection bias as a frozen parameter where others hold a buffer."""

UNSUPPORTED = {
    "Llama4TextExperts": (
        "llama4 runs every expert on every token and scales the experts' input, outside transformers' experts "
        "interface: single experts can be neither pinned nor split out"
    ),
}
"""Class of the experts module -> why it is refused, in one line."""


@dataclass(frozen=True)
class RouterLayout:
    """How a router class departs from `(logits, top-k weights, top-k index)` with a rule that knows logits alone."""

    returns_probabilities: bool = False
    factor: str | None = None
    """Attribute [E] that multiplies the weight of each chosen expert."""
    jitter: str | None = None
    """Attribute that holds sparsemixer's jitter, which its evaluation-mode weights depend on too."""

    def logits(self, first_output_TE: Tensor) -> Tensor:
        """Logits from the router's first output; log-probabilities are logits up to a shift per token."""
        if not self.returns_probabilities:
            return first_output_TE
        return first_output_TE.clamp(min=torch.finfo(first_output_TE.dtype).tiny).log()


STANDARD = RouterLayout()
ROUTER_LAYOUTS = {
    "Gemma4TextRouter": RouterLayout(returns_probabilities=True, factor="per_expert_scale"),
    "PhimoeTopKRouter": RouterLayout(jitter="router_jitter_noise"),
}


def router_layout(router: nn.Module) -> RouterLayout:
    """The layout of a router, the standard one unless its class is an exception."""
    return ROUTER_LAYOUTS.get(type(router).__name__, STANDARD)
