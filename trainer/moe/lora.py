"""The LoRA of single critical experts, multiplied out of PEFT's packed factors.

Of N experts PEFT (0.21) packs A [N * r, in], rows expert by expert, and B [out, r * N], the columns of expert n being
n, N + n, 2 * N + n ... Written out again here, so that what PEFT merges can be compared with something.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Delta = Callable[[int], Tensor]
"""Slot of a critical expert -> what LoRA adds to its weight [out, in], fp32."""


def lora_deltas(wrapped: nn.Module) -> dict[str, Delta]:
    """Name of an adapted parameter -> its delta, for a module in PEFT's wrappers; empty where it is not wrapped."""
    found: dict[str, Delta] = {}
    layer: Any = wrapped
    while hasattr(layer, "parameter_name"):
        (adapter,) = layer.active_adapters
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        # PEFT takes weights for [N, in, out] where the module above does not say otherwise.
        flipped = layer.num_experts > 1 and not layer._did_swap_in_out_features
        factors = (a.float(), b.float(), layer.scaling[adapter], layer.num_experts)
        found[layer.parameter_name] = partial(_delta, *factors, flipped)
        layer = layer.base_layer
    return found


@torch.no_grad()
def _delta(a: Tensor, b: Tensor, scale: float, experts: int, flipped: bool, slot: int) -> Tensor:
    rank = a.shape[0] // experts
    product = scale * b[:, slot::experts] @ a[slot * rank : (slot + 1) * rank]
    return product.T if flipped else product
