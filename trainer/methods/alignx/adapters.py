"""One LoRA adapter per axis in one model: which of them act, with what weight, and the one that trains.

PEFT's layers hold all adapters side by side. Which of them act is set layer by layer without touching gradients, since
PEFT's own `set_adapter` and `enable_adapters` turn the gradients of what they activate on again. With a weight for
each row of the batch, the adapters of a layer are computed as one of rank A x r whose inner units are weighed row by
row: exact, two small products whatever A is, and without `adapter_names`, which PEFT refuses for fused experts.

Shapes: B rows, S positions, A adapters that act, I and O inputs and outputs of a layer, R = A x r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from data_prep.errors import UserError
from trainer.methods.alignx.recipe import AdaptersSection
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import assign, on_the_cpu

PARTS = ("lora_A", "lora_B")


def lora_config(section: AdaptersSection) -> LoraConfig:
    """As PEFT takes it."""
    return LoraConfig(
        r=section.r,
        lora_alpha=cast(int, section.alpha),  # PEFT divides by it, whole or not
        lora_dropout=section.dropout,
        target_modules=list(section.targets),
        task_type="CAUSAL_LM",
    )


class AxisAdapters:
    """The adapters of a model, by name. The model is frozen, and computes as without them until some act.

    Args:
        names: of the adapters; each starts from weights drawn with `seed`, whatever the others are.

    Raises:
        UserError: the model has no layers of the names in `adapters.targets`.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], section: AdaptersSection, seed: int):
        self.backbone, self.model, self.names = backbone, backbone.model, tuple(names)
        self.section, self.scale = section, section.alpha / section.r
        self.model.requires_grad_(False)
        _refuse_absent(self.model, section.targets)
        tuner: LoraModel | None = None
        on_meta = self.model.device.type == "meta"  # a planner's, whose adapters must hold no bytes either
        for name in self.names:
            set_seed(seed)
            if tuner is None:
                tuner = LoraModel(self.model, lora_config(section), name, low_cpu_mem_usage=on_meta)
            else:  # as `PeftModel.add_adapter` does
                tuner.peft_config[name] = lora_config(section)
                tuner.inject_adapter(self.model, name, low_cpu_mem_usage=on_meta)
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)
        }
        for name in self.names:
            for parameter in self.parameters(name).values():
                # 16-bit weights swallow small updates.
                parameter.data = parameter.data.to(torch.promote_types(self.model.dtype, torch.float32))
        self._act(())

    # --- what acts --------------------------------------------------------------------------------

    def _act(self, names: Sequence[str]) -> None:
        for layer in self.layers.values():
            layer.set_adapter(list(names), inference_mode=True)

    @contextmanager
    def acting(self, *names: str) -> Iterator[None]:
        """Compute with these adapters added inside, each at its own scale; with none: as the base."""
        former = self._acting
        self._act(names)
        try:
            yield
        finally:
            self._act(former)

    @contextmanager
    def weighted(self, alpha_BA: Tensor) -> Iterator[None]:
        """Compute with the first A adapters added, every row of the batch at its own weights [B, A].

        A forward pass of more rows (samples or beams of each prompt, side by side) gives each its prompt's weights.
        """
        names = self.names[: alpha_BA.shape[1]]
        for layer in self.layers.values():
            vars(layer)["forward"] = _weighted_forward(layer, names, alpha_BA * self.scale)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del vars(layer)["forward"]

    @property
    def _acting(self) -> list[str]:
        return list(next(iter(self.layers.values())).active_adapters)

    # --- the weights ------------------------------------------------------------------------------

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Name in the model, the adapter's own left out -> parameter of one adapter."""
        found = {}
        for where, layer in self.layers.items():
            for part in PARTS:
                found[f"{where}.{part}.weight"] = getattr(layer, part)[name].weight
        return found

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in the stock model -> parameter that is none of the adapters'."""
        for name, parameter in self.model.named_parameters():
            if not any(f".{part}." in name for part in PARTS):
                yield name.replace(".base_layer.", "."), parameter

    @torch.no_grad()
    def delta(self, layer: LoraLayer, name: str) -> Tensor:
        """The task vector of one adapter in one layer, `scale * B @ A`, [out, in], fp32."""
        a, b = (getattr(layer, part)[name].weight.float() for part in PARTS)
        return self.scale * (b @ a)

    def digest(self, name: str) -> str:
        """Hex digest of one adapter's weights."""
        found = hashlib.blake2b(digest_size=16)
        for where, value in sorted(on_the_cpu(self.parameters(name), keep=True).items()):
            found.update(where.encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def base_digest(self) -> str:
        """Hex digest of the base's weights, every bit of them, whatever file they came from."""
        found = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(self.base_parameters()):
            held = parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
            found.update(name.encode())
            found.update(held.data)
        return found.hexdigest()


class Adapter:
    """One adapter as a training stage takes it (`moe.trainable.Trained`): it acts and trains, nothing else does."""

    def __init__(self, adapters: AxisAdapters, name: str):
        self.adapters, self.name = adapters, name
        self.model: PreTrainedModel = adapters.model
        self.is_original = True

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, gradients reach this adapter alone, and it alone acts."""
        self.model.requires_grad_(False)
        with self.adapters.acting(self.name):
            for parameter in self.adapters.parameters(self.name).values():
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                self.model.requires_grad_(False)

    def drop(self) -> None:
        """Dropout of this adapter's inputs, in a model that is else in evaluation mode."""
        for layer in self.adapters.layers.values():
            layer.lora_dropout[self.name].train()

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The adapter's weights, on the CPU. Collective."""
        return on_the_cpu(self.adapters.parameters(self.name), keep=keep)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the weights of an adapter with other targets or of another rank.
        """
        mine = self.adapters.parameters(self.name)
        if mine.keys() != state.keys():
            raise ValueError(
                f"adapter {self.name!r}: saved weights have other targets: {sorted(mine.keys() ^ state.keys())[:2]}"
            )
        for name, parameter in mine.items():
            if parameter.shape != state[name].shape:
                found = list(state[name].shape)
                raise ValueError(
                    f"adapter {self.name!r}: {name}: found shape {found}, expected {list(parameter.shape)}"
                )
            assign(parameter, state[name])
        self.is_original = False


def _weighted_forward(layer: LoraLayer, names: Sequence[str], weight_BA: Tensor) -> Callable[[Tensor], Tensor]:
    a_RI = torch.cat([layer.lora_A[name].weight for name in names])
    b_OR = torch.cat([layer.lora_B[name].weight for name in names], 1)
    weight_BR = weight_BA.to(a_RI).repeat_interleave(len(a_RI) // len(names), 1)
    base = layer.get_base_layer()

    def forward(x_BSI: Tensor) -> Tensor:
        base_BSO: Tensor = base(x_BSI)
        weight_B1R = weight_BR.repeat_interleave(x_BSI.shape[0] // len(weight_BR), 0).unsqueeze(1)
        inner_BSR = F.linear(x_BSI.to(a_RI.dtype), a_RI) * weight_B1R
        return (base_BSO + F.linear(inner_BSR, b_OR)).to(base_BSO.dtype)

    return forward


def _refuse_absent(model: nn.Module, targets: Sequence[str]) -> None:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    absent = [target for target in targets if target not in linear]
    if absent:
        allowed = ", ".join(sorted(linear))
        raise UserError(f"adapters.targets: the model has no linear layer named {absent[0]!r}; found: {allowed}")
