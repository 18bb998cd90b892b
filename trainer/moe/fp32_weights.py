"""Modules that train whole (routers, shared experts, attention): fp32 weights that compute in the model's own type,
and the original ones to go back to.

Updates of a 16-bit weight that are smaller than its spacing are lost, so the weights are held in fp32. They compute
cast to the model's type, which is what will be exported: what is trained is what is kept. The originals are modules of
their own outside the model, so that no engine shards them and nothing is written to switch between the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Fp32Weights:
    """Modules of a model (name -> module), made trainable; `restore_dtype` undoes it.

    `originals`: name -> a copy with the original weights, outside of the model.

    ZeRO-3 gathers a parameter for the module that holds it, so a module whose children hold parameters is given as
    these children; a router computes with its own. A module inside another one that is given too casts its own.

    Args:
        originals: the copies, where somebody holds them already; they have the model's own types.
    """

    def __init__(self, modules: Mapping[str, nn.Module], originals: Mapping[str, nn.Module] | None = None):
        self._modules = dict(modules)
        self.originals = dict(originals or {name: _twin(module) for name, module in self._modules.items()})
        given = {id(module) for module in self._modules.values()}
        for name, module in self._modules.items():
            # Asked of the original: a tied head's weight is in fp32 already when its turn comes.
            if any(torch.finfo(parameter.dtype).bits < 32 for parameter in self.originals[name].parameters()):
                # Parameters alone: a selection bias among the buffers has a type of its own.
                for parameter in module.parameters():
                    parameter.data = parameter.data.float()
                self._set_forward(name, _cast_forward(module, self.originals[name], given - {id(module)}))

    def _set_forward(self, name: str, forward: Callable[..., Any]) -> None:
        setattr(self._modules[name], "forward", forward)  # noqa: B010 - mypy refuses the plain assignment

    @contextmanager
    def original(self) -> Iterator[None]:
        """Compute with the original weights inside; without gradients."""
        trained = {name: module.forward for name, module in self._modules.items()}
        for name, twin in self.originals.items():
            twin.to(next(iter(self._modules[name].parameters())).device)
            self._set_forward(name, twin.forward)
        try:
            yield
        finally:
            for name, forward in trained.items():
                self._set_forward(name, forward)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, each once: a module's children are given beside it."""
        return {
            f"{name}.{own}": parameter
            for name, module in self._modules.items()
            for own, parameter in module.named_parameters(recurse=False)
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name in the model -> the type that each parameter has in the checkpoint."""
        return {
            f"{name}.{part}": parameter.dtype
            for name, twin in self.originals.items()
            for part, parameter in twin.named_parameters()
        }

    def restore_dtype(self) -> None:
        """Give the modules their own type and forward back. Not for a sharded model."""
        for name, module in self._modules.items():
            for parameter, former in zip(module.parameters(), self.originals[name].parameters(), strict=True):
                parameter.data = parameter.data.to(former.dtype)
            module.__dict__.pop("forward", None)


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    # Hooks belong to the module in the model, which keeps calling them around whatever forward it has.
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    return twin.eval().requires_grad_(False)


def _cast_forward(module: nn.Module, original: nn.Module, others: set[int]) -> Callable[..., Any]:
    """The module's own forward with its parameters cast to the original's types; gradients reach the uncast ones.

    `others`: ids of modules that cast their own parameters.
    """
    dtypes = {name: parameter.dtype for name, parameter in original.named_parameters()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        held = [
            (inner._parameters, own, parameter, dtypes[f"{prefix}.{own}" if prefix else own])
            for prefix, inner in module.named_modules()
            if id(inner) not in others
            for own, parameter in inner._parameters.items()
            if parameter is not None
        ]
        for parameters, own, parameter, dtype in held:
            parameters[own] = parameter.to(dtype)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            for parameters, own, parameter, _ in held:
                parameters[own] = parameter

    return forward
