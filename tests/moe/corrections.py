"""Corrections of the families' tiny models, for tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.moe.backbone import Backbone
from trainer.moe.rank_one import Correction, Unit
from trainer.moe.writers import Writer

D = 32


def direction(seed: int) -> Tensor:
    vector = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vector / vector.norm()).float()


def correction_of(writers: list[Writer], strength: float = 0.7, seed: int = 0) -> Correction:
    """Experts 1 and 6 of every layer that has some, and every other writer of layers 0 and 1."""
    units: list[Unit] = []
    for writer in writers:
        if writer.is_fused:
            units += [Unit(writer.layer, writer.kind, expert) for expert in (1, 6)]
        elif writer.layer < 2:
            units.append(Unit(writer.layer, writer.kind))
    layers = {unit.layer for unit in units}
    return Correction(tuple(units), {layer: direction(seed + layer) for layer in layers}, strength)


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def slices(writer: Writer, units: tuple[Unit, ...]) -> Iterator[int | None]:
    for unit in units:
        if (unit.layer, unit.kind) == (writer.layer, writer.kind):
            yield unit.expert
