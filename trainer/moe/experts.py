"""Split critical experts out of fused tensors so that exactly they can be trained.

A fused tensor [E, ...] trains all of its experts or none; masking gradients still pays for optimiser state, and
weight decay moves the "frozen" ones. So the critical experts of a layer get compact parameters [N, ...] of their own
while the fused tensor stays frozen, untouched. The split forward sorts tokens once and runs grouped matmuls over two
disjoint ranges, frozen and critical. Because the fused tensor still holds the original experts, switching the split
off *is* the original model: no second copy.

Shapes: T tokens, S = T x K routed (token, slot) rows, E experts, N critical experts of a layer, D hidden size,
F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from trainer.moe.backbone import Backbone, expert_tensor_names
from trainer.moe.expert_set import ExpertSet
from trainer.moe.fp32_weights import Fp32Weights
from trainer.moe.lora import lora_deltas
from trainer.moe.modes import evaluating
from trainer.moe.sharding import assign, gathered, on_the_cpu, whole

FusedExperts = Any
"""A module decorated with transformers' `use_experts_implementation`; upstream does not type its attributes."""

IMPLEMENTATION = "routealign_split"
CHILD = "critical"


class CriticalExperts(nn.Module):
    """The trainable copies of a layer's critical experts, weights [N, out, in] whatever the model's own layout.

    Kept in fp32 under a 16-bit model, because bf16 weights swallow small updates; cast to the activations' type on
    use. PEFT wraps this module's `forward` to add LoRA; its path for a single expert (peft 0.21,
    `ParamWrapper.get_delta_weight` with num_experts == 1) only knows [out, in], hence the one layout here.
    """

    def __init__(self, experts: FusedExperts, indices: list[int]):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = experts.has_gate, experts.has_bias, False
        self.fused_is_transposed = experts.is_transposed
        reference = experts.down_proj
        self.register_buffer("indices", torch.tensor(indices, device=reference.device), persistent=False)
        # Slot of every expert in the sorted order: frozen experts keep their index, critical ones come last.
        slots = torch.arange(reference.shape[0], device=reference.device)
        slots[indices] = reference.shape[0] + torch.arange(len(indices), device=reference.device)
        self.register_buffer("slot_E", slots, persistent=False)
        dtype = torch.promote_types(reference.dtype, torch.float32)
        for name in expert_tensor_names(experts):
            weights = self.turned(getattr(experts, name).detach()[self.indices]).to(dtype)
            self.register_parameter(name, nn.Parameter(weights.clone(memory_format=torch.contiguous_format)))

    def turned(self, weights: Tensor) -> Tensor:
        """Between the fused tensor's layout and ours; its own inverse. Biases [N, out] have one layout only."""
        return weights.transpose(-2, -1) if self.fused_is_transposed and weights.ndim == 3 else weights

    def fused_weights(self, name: str) -> Tensor:
        """The parameter `name` in the layout of the fused tensor."""
        return self.turned(getattr(self, name))

    def forward(self, rows_SD: Tensor, counts_N: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
        """Run rows sorted by critical expert; `counts_N` rows belong to each.

        A batch that routes nothing here still touches every parameter (with zero gradient), or sharded engines wait
        forever for its gradient.
        """
        up_name = "gate_up_proj" if self.has_gate else "up_proj"
        hidden = self._linear(rows_SD, up_name, counts_N)
        return self._linear(apply_gate(hidden), "down_proj", counts_N)

    def _linear(self, rows: Tensor, name: str, counts_N: Tensor) -> Tensor:
        weight = getattr(self, name).to(rows.dtype)
        bias = getattr(self, f"{name}_bias").to(rows.dtype) if self.has_bias else None
        if rows.shape[0] == 0:
            out = rows @ weight[0].T
            return out if bias is None else out + bias[0]
        bias_S = None if bias is None else bias.repeat_interleave(counts_N, dim=0)
        offsets_N = counts_N.cumsum(0).to(torch.int32)
        return _grouped_linear(rows, weight, offsets_N, bias=bias_S)


def split_experts_forward(
    experts: FusedExperts, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """Experts forward over frozen and critical experts, registered with transformers as `routealign_split`."""
    critical = getattr(experts, CHILD, None)
    if critical is None or not experts.split_enabled:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_TD, top_k_index_TK, top_k_weights_TK)
    num_tokens, top_k = top_k_index_TK.shape
    num_experts = experts.down_proj.shape[0]
    slots_E: Tensor = experts.split_slots
    slots_S, order_S = torch.sort(slots_E[top_k_index_TK.reshape(-1)], stable=True)
    counts = torch.bincount(slots_S, minlength=num_experts + experts.split_size)
    counts_E, counts_N = counts[:num_experts], counts[num_experts:]
    rows_SD = hidden_TD[order_S // top_k]
    frozen_rows = int(counts_E.sum())

    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    apply_gate = experts._apply_gate if experts.has_gate else experts.act_fn
    frozen_SD = _frozen_linear(experts, rows_SD[:frozen_rows], up_name, counts_E)
    frozen_SD = _frozen_linear(experts, apply_gate(frozen_SD), "down_proj", counts_E)
    critical_SD = critical(rows_SD[frozen_rows:], counts_N, apply_gate)
    out_SD = torch.cat([frozen_SD, critical_SD])
    if experts.has_post_expert_norm:
        out_SD = experts.post_expert_norm(out_SD)
    out_SD = out_SD * top_k_weights_TK.reshape(-1)[order_S].unsqueeze(-1)
    unsorted_SD = torch.empty_like(out_SD).index_copy(0, order_S, out_SD)
    return unsorted_SD.view(num_tokens, top_k, -1).sum(1).to(hidden_TD.dtype)


def _frozen_linear(experts: FusedExperts, rows: Tensor, name: str, counts_E: Tensor) -> Tensor:
    bias_S = getattr(experts, f"{name}_bias").repeat_interleave(counts_E, dim=0) if experts.has_bias else None
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    return _grouped_linear(rows, getattr(experts, name), offsets_E, bias=bias_S, is_transposed=experts.is_transposed)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_experts_forward)


class SplitModel:
    """A model whose critical experts are trainable parameters of their own; everything else is frozen.

    Shared experts that belong to the set train whole and in place, with LoRA on the others too; so do the modules that
    are given beside them.

    Args:
        backbone: the model's MoE layers.
        expert_set: the experts to split out; may be empty where modules train beside them.
        lora_rank: train LoRA of this rank on the critical experts instead of their full weights.
        beside: name in the model -> module without children that trains too, as a projection of attention.

    Raises:
        ValueError: nothing would be trained, a set of another model, a shared expert that the model does not have, or
            a model that is split already.
    """

    def __init__(
        self,
        backbone: Backbone,
        expert_set: ExpertSet,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        beside: Mapping[str, nn.Module] | None = None,
    ):
        if len(expert_set) == 0 and not beside:
            raise ValueError("expert set is empty: nothing would be trained")
        shape = {layer.index: layer.num_experts for layer in backbone}
        if shape != expert_set.experts_per_layer:
            raise ValueError(
                f"expert set is for experts per layer {expert_set.experts_per_layer}, the model has {shape}"
            )
        missing = set(expert_set.shared) - set(backbone.shared_layers)
        if missing:
            raise ValueError(f"expert set names the shared experts of layers {sorted(missing)}, which have none")
        if any(hasattr(layer.experts, CHILD) for layer in backbone):
            raise ValueError("the model is split already; fuse it first")
        self.backbone, self.model, self.expert_set = backbone, backbone.model, expert_set
        self.lora_rank, self.is_original, self.dtype = lora_rank, True, self.model.dtype
        self._former_implementation = self.model.config._experts_implementation
        self.model.requires_grad_(False)
        for index, experts in expert_set.by_layer().items():
            module: FusedExperts = backbone.layer(index).experts
            critical = CriticalExperts(module, experts)
            module.register_buffer("split_slots", critical.slot_E, persistent=False)  # moves with the module
            module.split_size, module.split_enabled = len(experts), True
            module.add_module(CHILD, critical)
        self.model.set_experts_implementation(IMPLEMENTATION)
        self._routers = Fp32Weights(backbone.routers())
        backbone.beside = self._shared_modules() | dict(beside or {})
        self._beside = Fp32Weights(backbone.beside)
        if lora_rank is not None and len(expert_set):
            self._add_lora(lora_rank, lora_alpha if lora_alpha is not None else 2.0 * lora_rank)

    def _add_lora(self, rank: int, alpha: float) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["gate_up_proj" if next(iter(self._split_layers()))[1].has_gate else "up_proj", "down_proj"]
        for _, critical in self._split_layers():
            critical.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=[], target_parameters=[f"{CHILD}.{name}" for name in names]
        )
        inject_adapter_in_model(config, self.model)

    def _split_layers(self) -> Iterator[tuple[FusedExperts, CriticalExperts]]:
        for index in self.expert_set.by_layer():
            experts = self.backbone.layer(index).experts
            critical = getattr(experts, CHILD)
            while not isinstance(critical, CriticalExperts):  # PEFT nests one wrapper per adapted parameter
                critical = critical.base_layer
            yield experts, critical

    def _shared_modules(self) -> dict[str, nn.Module]:
        """Name in the model -> module with parameters of its own, inside the shared experts of the set."""
        found: dict[str, nn.Module] = {}
        for index in self.expert_set.shared:
            layer = self.backbone.layer(index)
            assert layer.shared is not None
            for name, module in layer.shared.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    found[f"{layer.shared_name}.{name}" if name else f"{layer.shared_name}"] = module
        return found

    @property
    def originals(self) -> list[nn.Module]:
        """Modules outside of the model that hold original weights, whole on every process."""
        return [*self._routers.originals.values(), *self._beside.originals.values()]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that trains besides routers: experts (full weights or LoRA), what is beside."""
        wanted = "lora_" if self.lora_rank is not None else f".{CHILD}."
        split = {n: p for n, p in self.model.named_parameters() if f".{CHILD}." in n and wanted in n}
        return split | self._beside.parameters()

    def train_experts(self, *, routers: bool = False) -> None:
        """Let gradients reach what is `trainable` (and, if asked, the routers) and nothing else."""
        self.model.requires_grad_(False)
        for parameter in [
            *self.trainable().values(),
            *(self.backbone.router_parameters().values() if routers else ()),
        ]:
            parameter.requires_grad_(True)

    def train_routers(self) -> None:
        """Let gradients reach the routers and nothing else."""
        self.model.requires_grad_(False)
        for parameter in self.backbone.router_parameters().values():
            parameter.requires_grad_(True)

    @contextmanager
    def original(self, *, experts: bool = True, routers: bool = True) -> Iterator[Backbone]:
        """Run the unrepaired model inside: original experts and, where they moved, original routers. No gradients."""
        split = [experts_module for experts_module, _ in self._split_layers()] if experts else []
        for module in split:
            module.split_enabled = False
        former_beside = self._beside.original() if experts else nullcontext()
        former_routers = self._routers.original() if routers else nullcontext()
        try:
            # The original is a reference: no dropout, no router jitter.
            with torch.no_grad(), evaluating(self.model), former_beside, former_routers:
                yield self.backbone
        finally:
            for module in split:
                module.split_enabled = True

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """What the repair may have changed: trained expert parameters and all routers, on the CPU. Collective."""
        return on_the_cpu({**self.trainable(), **self.backbone.router_parameters()}, keep=keep)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: names or shapes differ from this split.
        """
        self.is_original = False
        mine = {**self.trainable(), **self.backbone.router_parameters()}
        if set(mine) != set(state):
            raise ValueError(f"saved state is of another split: {sorted(set(mine) ^ set(state))[:4]} ... differ")
        for name, parameter in mine.items():
            assign(parameter, state[name])

    @torch.no_grad()
    def stock_state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything the stock model holds, with the critical experts in their places.

        One whole tensor at a time, for a sharded model that no process could `fuse`. Collective.
        """
        dtypes = self._routers.dtypes() | self._beside.dtypes()
        split = {f"{self.backbone.layer(i).experts_name}.": i for i in self.expert_set.by_layer()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if f".{CHILD}." in name:
                continue
            parent, _, own = name.rpartition(".")
            index = split.get(f"{parent}.")
            value = whole(tensor) if index is None else self._repaired(index, own)
            yield name, value.to(dtypes.get(name, value.dtype))

    def _repaired(self, index: int, name: str) -> Tensor:
        """A copy of the fused tensor `name` of a layer with the trained experts in their places."""
        experts: FusedExperts = self.backbone.layer(index).experts
        with gathered(self.backbone, experts):
            value: Tensor = getattr(experts, name).detach().clone()
            layer, weights = getattr(experts, CHILD), None
            while not isinstance(layer, CriticalExperts):
                if layer.parameter_name == name:
                    (adapter,) = layer.active_adapters
                    weights = layer.get_delta_weight(adapter)
                layer = layer.base_layer
            trained = getattr(layer, name) if weights is None else getattr(layer, name) + weights
            value[layer.get_buffer("indices")] = layer.turned(trained.detach()).to(value.dtype)
        return value

    @torch.no_grad()
    def trained_state(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """What may be trained, as the forward computes with it: (name in the stock model, expert or None, tensor).

        One expert or one whole tensor at a time, in the stock model's layout and type. For a check of what `fuse` and
        an export make of it, so it shares nothing with them; LoRA is merged here in fp32. Collective.
        """
        for index, chosen in self.expert_set.by_layer().items():
            layer = self.backbone.layer(index)
            with gathered(self.backbone, layer.experts):
                critical = next(m for m in getattr(layer.experts, CHILD).modules() if isinstance(m, CriticalExperts))
                adapters = lora_deltas(getattr(layer.experts, CHILD))
                for name in expert_tensor_names(critical):
                    dtype = getattr(layer.experts, name).dtype
                    for slot, expert in enumerate(chosen):
                        value = getattr(critical, name)[slot].detach()
                        if name in adapters:
                            value = value.float() + adapters[name](slot)
                        flipped = layer.experts.is_transposed and value.ndim == 2
                        # A copy: FSDP2 frees the storage behind a gathered parameter, also under a view that is kept.
                        own = (value.T if flipped else value).to(dtype, copy=True)
                        yield f"{layer.experts_name}.{name}", expert, own
        dtypes = self._routers.dtypes() | self._beside.dtypes()
        for named in (self.backbone.router_parameters(), self._beside.parameters()):
            for name, parameter in named.items():
                yield name, None, whole(parameter).to(dtypes[name])

    @torch.no_grad()
    def fuse(self) -> None:
        """Write the critical experts back into the fused tensors and remove the split. The model is stock again."""
        assert not any(map(is_parametrized, self.model.modules())), "quantised: fuse into an unquantised copy instead"
        for experts, critical in self._split_layers():
            outer = getattr(experts, CHILD)
            while outer is not critical:
                outer.merge()
                outer = outer.base_layer
            for name in expert_tensor_names(critical):
                fused = getattr(experts, name)
                fused.data[critical.indices] = critical.fused_weights(name).to(fused.dtype)
            delattr(experts, CHILD)
            del experts.split_slots, experts.split_size, experts.split_enabled
        if hasattr(self.model, "peft_config"):  # left behind by PEFT's injection; save_pretrained would act on it
            del self.model.peft_config
        self._routers.restore_dtype()
        self._beside.restore_dtype()
        self.backbone.beside = {}
        self.model.set_experts_implementation(self._former_implementation)
