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
from trainer.moe.fp32_weights import Fp32Weights
from trainer.moe.sharding import assign, on_the_cpu, whole


class Trained(Protocol):
    """What every training stage asks of what it trains: a model, and the part of it that is saved and put back.

    `is_original`: nothing of it was trained or loaded yet, so that it computes what the original does. `state_dict`:
    collective; empty where `keep` is false, as one process of many holds it.
    """

    model: PreTrainedModel
    is_original: bool

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class TrainableModel(Trained, Protocol):
    """A model under repair: `SplitModel` (critical experts) or `WholeModel` (full fine-tuning, to compare with).

    `dtype`: the type it computes in, whatever what trains is held in.
    """

    backbone: Backbone
    dtype: torch.dtype

    @property
    def originals(self) -> list[nn.Module]:
        """Modules outside of the model that hold original weights, whole on every process."""

    def trainable(self) -> dict[str, nn.Parameter]: ...
    def train_experts(self, *, routers: bool = False) -> None: ...
    def train_routers(self) -> None: ...
    def original(self, *, experts: bool = True, routers: bool = True) -> AbstractContextManager[Backbone]: ...
    def fuse(self) -> None: ...
    def stock_state(self) -> Iterator[tuple[str, Tensor]]: ...
    def trained_state(self) -> Iterator[tuple[str, int | None, Tensor]]: ...


class WholeModel:
    """Every parameter trainable, in fp32; the original is a second, frozen copy (which the split does without)."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.model = backbone, backbone.model
        self.is_original, self.dtype = True, self.model.dtype
        self.reference = Backbone.of(copy.deepcopy(self.model).eval().requires_grad_(False))
        for layer, source in zip(self.reference, backbone, strict=True):
            layer.scoring = source.scoring
        self._routers = Fp32Weights(backbone.routers())
        # As the split's experts are: 16-bit weights swallow most updates, and the comparison would not be fair.
        copies = dict(self.reference.model.named_modules())
        others = _outside_of_routers(backbone)
        self._others = Fp32Weights(others, {name: copies[name] for name in others})

    @property
    def originals(self) -> list[nn.Module]:
        return list(self._routers.originals.values())

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
                yield self.reference
            return
        with torch.no_grad(), self._routers.original():
            yield self.backbone

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        return on_the_cpu(dict(self.model.named_parameters()), keep=keep)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.is_original = False
        for name, parameter in self.model.named_parameters():
            assign(parameter, state[name])

    def fuse(self) -> None:
        """Nothing to fuse, but every module gets its type back."""
        self._routers.restore_dtype()
        self._others.restore_dtype()

    def stock_state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of everything a stock checkpoint holds, one at a time, in the model's own types."""
        dtypes = self._others.dtypes() | self._routers.dtypes()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            value = whole(tensor)
            yield name, value.to(dtypes.get(name, value.dtype))

    def trained_state(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every parameter, as `SplitModel.trained_state` gives them."""
        dtypes = self._others.dtypes() | self._routers.dtypes()
        for name, parameter in self.model.named_parameters():
            value = whole(parameter)
            yield name, None, value.to(dtypes.get(name, value.dtype))


def _outside_of_routers(backbone: Backbone) -> dict[str, nn.Module]:
    """Name -> every module with parameters of its own that is no part of a router."""
    modules, routers = dict(backbone.model.named_modules()), tuple(f"{name}." for name in backbone.routers())
    found = {}
    for name, module in modules.items():
        if next(module.parameters(recurse=False), None) is None or f"{name}.".startswith(routers):
            continue
        # The weight of a convolution over positions is read by the module around it, which never calls it.
        within = name.rpartition(".")[0] if isinstance(module, nn.Conv1d) else name
        found[within] = modules[within]
    return found
