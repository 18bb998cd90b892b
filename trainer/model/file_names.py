"""What a model's tensors are called in the files of a checkpoint, layer by layer.

Files name tensors as the Hub does (one tensor per expert, where the model stacks them) or as the model does. Either
way they are made of one layer at a time, so that a second copy of a model never has to be held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class FileNames:
    """One way of naming a model's tensors in files.

    `shapes`: name in the files -> tensor on the meta device, with the model's shape and type.

    Args:
        names: of the model's state, those that the files hold.
    """

    def __init__(self, model: PreTrainedModel, convert: Convert, names: Iterable[str]) -> None:
        self._state: Mapping[str, Tensor] = model.state_dict()
        self._convert = convert
        own = {name: torch.empty_like(self._state[name], device="meta") for name in names}
        ordered = sorted(own, key=dot_natural_key)
        self._layers = [list(group) for _, group in groupby(ordered, key=layer_of)]
        # Each with storage of its own: the sizes of views would be those of what they are views of.
        self.shapes = {name: torch.empty_like(tensor) for name, tensor in convert(own).items()}
        made = [convert({name: own[name] for name in layer}) for layer in self._layers]
        if sorted(name for names in made for name in names) != sorted(self.shapes):
            self._layers, made = [ordered], [self.shapes]  # rules that look at several layers at once
        self._layer_of = {name: number for number, names in enumerate(made) for name in names}
        self._made: tuple[int, dict[str, Tensor]] = (-1, {})

    def tensor(self, name: str) -> Tensor:
        """The model's tensor of this name in the files; its layer is kept until another one's is asked for."""
        number = self._layer_of[name]
        if self._made[0] != number:
            self._made = (-1, {})  # let go of the last one before the next is made
            self._made = (number, self._convert({own: self._state[own] for own in self._layers[number]}))
        return self._made[1][name]

    @property
    def by_layer(self) -> list[str]:
        """The names in the files, those of one layer together."""
        return list(self._layer_of)


def hub_names(model: PreTrainedModel, names: Iterable[str] | None = None) -> FileNames:
    """As transformers writes them by default, and as the Hub has them."""
    return FileNames(model, lambda state: revert_weight_conversion(model, state), _all(model, names))


def own_names(model: PreTrainedModel, names: Iterable[str] | None = None) -> FileNames:
    """As the model itself has them, experts of a layer in one tensor."""
    return FileNames(model, lambda state: state, _all(model, names))


def _all(model: PreTrainedModel, names: Iterable[str] | None) -> Iterable[str]:
    return model.state_dict() if names is None else names


def layer_of(name: str) -> str:
    """Everything up to the first number in a parameter's name, or the whole name."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name
