"""Record a router's decisions, or pin them to given ones: context managers on a Backbone that always detach.

Recorded indices are the ones the router returned, never recomputed. Padding is part of what a router sees, so masks
are the caller's business (`Trace.masked`).

Shapes: T tokens (batch x positions, padding included), E experts, K chosen experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.moe.backbone import Backbone, MoELayer, RouterOutput


@dataclass
class Trace:
    """What the routers returned in one forward pass, by decoder-layer index."""

    logits_TE: dict[int, Tensor] = field(default_factory=dict)
    weights_TK: dict[int, Tensor] = field(default_factory=dict)
    index_TK: dict[int, Tensor] = field(default_factory=dict)

    def masked(self, mask_T: Tensor) -> Trace:
        """The same trace with only the tokens where `mask_T` (bool, [T]) is true."""
        mask_T = mask_T.reshape(-1)
        return Trace(
            *({i: t[mask_T] for i, t in part.items()} for part in (self.logits_TE, self.weights_TK, self.index_TK))
        )


@contextmanager
def record(backbone: Backbone, *, grad: bool = False) -> Iterator[Trace]:
    """Collect the routers' outputs of the forward pass run inside.

    Args:
        grad: keep the graph of the logits, for a loss on routing.

    Raises:
        ValueError: a second forward pass inside the same context, which would mix two batches.
    """
    trace = Trace()

    def hook_of(layer: MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: RouterOutput) -> None:
            if layer.index in trace.logits_TE:
                raise ValueError("record: one forward pass per context; open a new one for the next batch")
            logits, weights, index = layer.read(output)
            trace.logits_TE[layer.index] = logits if grad else logits.detach()
            trace.weights_TK[layer.index] = weights.detach()
            trace.index_TK[layer.index] = index.detach()

        return hook

    # Before any pin's hook: what is recorded is the router's own decision, also where another one is forced.
    handles = [layer.router.register_forward_hook(hook_of(layer), prepend=True) for layer in backbone]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pin(backbone: Backbone, index_TK: dict[int, Tensor]) -> Iterator[None]:
    """Force the given experts (by layer index, each [T, K]) on every forward pass inside.

    Weights are those of the forced experts under the current logits, so gradients still reach the router; pinning a
    model to its own routing changes nothing, bit for bit. Keep the context open during `backward` too when gradient
    checkpointing recomputes the forward.

    Raises:
        ValueError: a layer missing from `index_TK`, a router whose scoring family is unknown, or a batch of another
            size than the recorded one.
    """
    missing = [layer.index for layer in backbone if layer.index not in index_TK]
    if missing:
        raise ValueError(f"pin: no indices for layers {missing}")
    unknown = [layer.router_name for layer in backbone if layer.scoring is None]
    if unknown:
        raise ValueError(
            f"pin: scoring family of {unknown[0]} is unknown (run Backbone.check first); it cannot be replayed"
        )

    def hook_of(layer: MoELayer) -> Callable[..., RouterOutput]:
        forced_TK = index_TK[layer.index]

        def hook(_module: nn.Module, _args: object, output: RouterOutput) -> RouterOutput:
            logits, weights, index = layer.read(output)
            if forced_TK.shape != index.shape:
                raise ValueError(
                    f"pin: layer {layer.index} routes {tuple(index.shape)} but {tuple(forced_TK.shape)} was recorded"
                )
            assert layer.scoring is not None
            chosen_TK = forced_TK.to(index.device, index.dtype)
            forced_weights_TK = layer.scoring.weights(logits, chosen_TK.long()).to(weights.dtype)
            # Tokens that the router sends there anyway keep its own weights, to the last bit.
            own_T1 = (chosen_TK == index).all(-1, keepdim=True)
            return output[0], torch.where(own_T1, weights, forced_weights_TK), chosen_TK

        return hook

    handles = [layer.router.register_forward_hook(hook_of(layer)) for layer in backbone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def log_routing(backbone: Backbone, trace: Trace) -> dict[int, Tensor]:
    """Layer -> log-probabilities [T, E] (fp32) of the experts as the layer's own family weighs them."""
    return {layer.index: layer.log_distribution(trace.logits_TE[layer.index]) for layer in backbone}


def flip_rate(before_TK: Tensor, after_TK: Tensor) -> float:
    """Share of (token, slot) choices in `before_TK` that `after_TK` no longer makes; order in a token is ignored."""
    if before_TK.numel() == 0:
        return 0.0
    kept_TK = (before_TK.unsqueeze(-1) == after_TK.unsqueeze(-2)).any(-1)
    return 1.0 - kept_TK.double().mean().item()
