"""A tensor of a model that is edited and put back: in place, or, where it is packed, as often as a forward reads it.

A packed tensor's bytes stay as they are: the edit is a second parametrisation behind `Packed`, so that a forward
dequantises, edits and computes, and no process holds more than it does without the edit. To put it back is to take
that parametrisation away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from trainer.moe.backbone import Backbone
from trainer.moe.sharding import assign, is_sharded, whole

Change = Callable[[Tensor], None]
"""Writes into a whole tensor, always to the same effect."""


class Editable(Protocol):
    """`edit`, `now` and `restore` are collective where the model is sharded."""

    def edit(self, change: Change) -> None:
        """Change what forward passes read, after the changes before it."""

    def now(self) -> Tensor:
        """The whole tensor as forward passes read it; not to be written to."""

    def former(self) -> Tensor:
        """The same as it was before the first edit."""

    def restore(self) -> None:
        """Every byte as it was."""


def is_packed(model: nn.Module, name: str) -> bool:
    """Whether `quantise` packed the tensor of that name."""
    module, _, own = name.rpartition(".")
    return is_parametrized(model.get_submodule(module), own)


def editable(backbone: Backbone, name: str) -> Editable:
    """The parameter of that name, as the model was loaded. Collective where it is sharded."""
    if not is_packed(backbone.model, name):
        return _Whole(backbone.model.get_parameter(name), is_sharded(backbone.model))
    module, _, own = name.rpartition(".")
    parametrizations: nn.ModuleDict = backbone.model.get_submodule(module).parametrizations
    held = parametrizations[own]
    assert isinstance(held, ParametrizationList)
    return _Dequantised(held)


class _Whole:
    def __init__(self, parameter: nn.Parameter, sharded: bool):
        self._parameter, self._sharded = parameter, sharded
        self._former = whole(parameter).clone()

    @torch.no_grad()
    def edit(self, change: Change) -> None:
        value = whole(self._parameter)
        change(value)
        if self._sharded:
            assign(self._parameter, value)

    def now(self) -> Tensor:
        return whole(self._parameter)

    def former(self) -> Tensor:
        return self._former

    @torch.no_grad()
    def restore(self) -> None:
        assign(self._parameter, self._former)


class _Dequantised:
    def __init__(self, held: ParametrizationList):
        self._held, self._length = held, len(held)

    def edit(self, change: Change) -> None:
        self._held.append(_Changed(change))

    def now(self) -> Tensor:
        return self._held()

    def former(self) -> Tensor:
        value = self._held.original
        for index in range(self._length):
            value = self._held[index](value)
        return value

    def restore(self) -> None:
        del self._held[self._length :]


class _Changed(nn.Module):
    def __init__(self, change: Change):
        super().__init__()
        self._change = change

    @torch.no_grad()
    def forward(self, dequantised: Tensor) -> Tensor:
        # Made for this reading alone, so it may be written to.
        self._change(dequantised)
        return dequantised
