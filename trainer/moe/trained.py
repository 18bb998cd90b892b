"""What a training stage may ask of a model under repair, and the whole-model baseline that answers it too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.moe.backbone import Backbone


class Trained(Protocol):
    """A model under repair: `SplitModel` (critical experts) or `WholeModel` (full fine-tuning, to compare with)."""

    backbone: Backbone
    model: PreTrainedModel

    def trainable(self) -> dict[str, nn.Parameter]: ...
    def train_experts(self, *, routers: bool = False) -> None: ...
    def train_routers(self) -> None: ...
    def original(self, *, experts: bool = True, routers: bool = True) -> AbstractContextManager[Backbone]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
    def fuse(self) -> None: ...


@contextmanager
def routers_swapped(backbone: Backbone, values: dict[str, Tensor]) -> Iterator[None]:
    """Run with other router weights inside, without gradients; the present ones come back."""
    current = backbone.router_parameters()
    kept = {name: current[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                current[name].data.copy_(value)
            yield
    finally:
        for name, value in kept.items():
            current[name].data.copy_(value)


class WholeModel:
    """Every parameter trainable; the original is a second, frozen copy (which the split does without)."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.model = backbone, backbone.model
        reference = Backbone.of(copy.deepcopy(self.model).eval().requires_grad_(False))
        for layer, source in zip(reference, backbone, strict=True):
            layer.scoring = source.scoring
        self._reference = reference

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def train_experts(self, *, routers: bool = True) -> None:
        """Let gradients reach every parameter; full fine-tuning does not leave the routers out."""
        self.model.requires_grad_(True)

    def train_routers(self) -> None:
        self.model.requires_grad_(False)
        for parameter in self.backbone.router_parameters().values():
            parameter.requires_grad_(True)

    @contextmanager
    def original(self, *, experts: bool = True, routers: bool = True) -> Iterator[Backbone]:
        """The original model; with `experts=False` the trained model under the original routers."""
        if experts:
            with torch.no_grad():
                yield self._reference
            return
        with routers_swapped(self.backbone, dict(self._reference.router_parameters())):
            yield self.backbone

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])

    def fuse(self) -> None:
        """Nothing to fuse: the model is stock."""
