"""Routers under repair: fp32 weights that compute in the model's own type, and the original ones to go back to.

Updates of a 16-bit weight that are smaller than its spacing are lost, so routers are held in fp32. They compute with
the weights cast to the model's type, which is what will be exported: what is trained is what is kept. The originals
are modules of their own outside the model, so that no engine shards them and nothing is written to switch between the
two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.moe.backbone import Backbone


class Routers:
    """The routers of a model, made trainable; `restore_dtype` undoes it."""

    def __init__(self, backbone: Backbone):
        self._routers = {layer.router_name: layer.router for layer in backbone}
        self._originals = {name: _twin(router) for name, router in self._routers.items()}
        for name, router in self._routers.items():
            if any(torch.finfo(parameter.dtype).bits < 32 for parameter in router.parameters()):
                # Parameters alone: a selection bias among the buffers has a type of its own.
                for parameter in router.parameters():
                    parameter.data = parameter.data.float()
                self._set_forward(name, _cast_forward(router, self._originals[name]))

    def _set_forward(self, name: str, forward: Callable[..., Any]) -> None:
        setattr(self._routers[name], "forward", forward)  # noqa: B010 - mypy refuses the plain assignment

    @contextmanager
    def original(self) -> Iterator[None]:
        """Route as the original model does inside; without gradients."""
        trained = {name: router.forward for name, router in self._routers.items()}
        for name, twin in self._originals.items():
            twin.to(next(iter(self._routers[name].parameters())).device)
            self._set_forward(name, twin.forward)
        try:
            yield
        finally:
            for name, forward in trained.items():
                self._set_forward(name, forward)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name in the model -> the type that each router parameter has in the checkpoint."""
        return {
            f"{name}.{part}": parameter.dtype
            for name, twin in self._originals.items()
            for part, parameter in twin.named_parameters()
        }

    def restore_dtype(self) -> None:
        """Give the routers their own type and forward back. Not for a sharded model."""
        for name, router in self._routers.items():
            for parameter, former in zip(router.parameters(), self._originals[name].parameters(), strict=True):
                parameter.data = parameter.data.to(former.dtype)
            router.__dict__.pop("forward", None)


def _twin(router: nn.Module) -> nn.Module:
    twin = copy.deepcopy(router)
    # Hooks belong to the module in the model, which keeps calling them around whatever forward it has.
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    return twin.eval().requires_grad_(False)


def _cast_forward(router: nn.Module, original: nn.Module) -> Callable[..., Any]:
    """The router's own forward with its parameters cast to the original's types; gradients reach the uncast ones."""
    dtypes = {name: parameter.dtype for name, parameter in original.named_parameters()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        held = [
            (module._parameters, own, parameter, dtypes[f"{prefix}.{own}" if prefix else own])
            for prefix, module in router.named_modules()
            for own, parameter in module._parameters.items()
            if parameter is not None
        ]
        for parameters, own, parameter, dtype in held:
            parameters[own] = parameter.to(dtype)
        try:
            return type(router).forward(router, *args, **kwargs)
        finally:
            for parameters, own, parameter, _ in held:
                parameters[own] = parameter

    return forward
