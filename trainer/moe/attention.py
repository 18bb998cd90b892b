"""Projections of a model's token mixers: attention, linear attention, short convolution."""

from __future__ import annotations

from torch import nn

from trainer.moe.backbone import Backbone
from trainer.moe.writers import blocks


def projections(backbone: Backbone) -> dict[int, dict[str, nn.Linear]]:
    """Decoder-layer index -> name in the model -> linear layer of its token mixer; every layer that has one."""
    found: dict[int, dict[str, nn.Linear]] = {}
    for index, kind, name, block in blocks(backbone):
        if kind == "mixer":
            linears = {f"{name}.{own}": one for own, one in block.named_modules() if isinstance(one, nn.Linear)}
            found.setdefault(index, {}).update(linears)
    return found
