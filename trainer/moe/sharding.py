"""Models that are split over processes: read a parameter whole, write it, run a forward on the parts.

ZeRO-3 leaves an empty tensor behind and marks the parameter with `ds_id`; FSDP2 makes it a DTensor. A model is cut
into units, one per decoder layer and one per module outside of them, so that no process ever holds more than one layer
whole. Reading, writing and forward passes are collective: every process takes part, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer.moe.backbone import Backbone

GATHER = "routealign_gather"
"""Name under which a ZeRO-3 model keeps its `GatheredForward`."""


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model needs every process (ZeRO-3, FSDP2)."""
    return any(is_partitioned(p) or isinstance(p, DTensor) for p in model.parameters())


def partitions(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model."""
    return any(is_partitioned(p) for p in model.parameters())


def size(parameter: Tensor) -> int:
    """Number of elements of the whole parameter; of a quantised one, of the tensor that it packs."""
    return int(getattr(parameter, "ds_numel", getattr(parameter, "whole_numel", parameter.numel())))


def _zero3_whole(parameters: list[Tensor], modifier_rank: int | None = None) -> AbstractContextManager[None]:
    """Inside, ZeRO-3's parameters are whole; afterwards every process has what `modifier_rank` wrote."""
    from deepspeed.runtime.zero import GatheredParameters

    gathering: AbstractContextManager[None] = GatheredParameters(parameters, modifier_rank=modifier_rank)
    return gathering


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter; the parameter itself where it is not sharded."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    held: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter  # type: ignore[attr-defined]
    return held


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, detached, on its device; the parameter itself where it is not sharded. Collective."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if is_partitioned(parameter):
        with _zero3_whole([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def on_the_cpu(parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU, one gathered at a time; nothing where `keep` is false. Collective."""
    held = {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if keep:
            held[name] = value.cpu().clone()
    return held


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a parameter with a whole value of its shape, the same on every process. Collective."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        # Every process holds the value, so none has to send it.
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    elif is_partitioned(parameter):
        with _zero3_whole([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.copy_(value)


@torch.no_grad()
def spread(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite tensors, whole on every process, by those of rank 0. Collective.

    Args:
        device: of the process; NCCL sends from a GPU alone.
    """
    for tensor in tensors:
        sent = tensor.to(device)
        torch.distributed.broadcast(sent, 0)
        tensor.copy_(sent)


@contextmanager
def gathered(backbone: Backbone, module: nn.Module) -> Iterator[None]:
    """Hold the parameters of a module inside a decoder layer whole, to be read. Collective where it is sharded."""
    if not is_sharded(module):
        yield
    elif partitions(module):
        with _zero3_whole(list(module.parameters())):
            yield
    else:
        unit: Any = next(unit for unit in units(backbone) if any(module is inner for inner in unit.modules()))
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()


def units(backbone: Backbone) -> list[nn.Module]:
    """The modules that are gathered as one: every decoder layer, and every module with parameters outside of them."""
    modules = dict(backbone.model.named_modules())
    layers = list(decoder_layers(backbone).values())
    inside = {id(module) for layer in layers for module in layer.modules()}
    others = [
        m for m in modules.values() if id(m) not in inside and next(m.parameters(recurse=False), None) is not None
    ]
    return layers + others


def decoder_layers(backbone: Backbone) -> dict[str, nn.Module]:
    """Name in the model -> decoder layer, in order; a layer's position is its index."""
    modules = dict(backbone.model.named_modules())
    stacks = {_stack_of(layer.experts_name, modules) for layer in backbone} or {_longest_stack(modules)}
    return {f"{name}.{i}": layer for name in sorted(stacks) for i, layer in modules[name].named_children()}


def _stack_of(name: str, modules: dict[str, nn.Module]) -> str:
    """Name of the outermost ModuleList that holds the module `name`: the decoder's layers."""
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
    return next(prefix for prefix in prefixes if isinstance(modules[prefix], nn.ModuleList))


def _longest_stack(modules: dict[str, nn.Module]) -> str:
    """Name of the ModuleList with most members: the decoder's layers of a model without experts."""
    sizes = {name: len(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    return max(sizes, key=lambda name: sizes[name])


def shard_fsdp2(backbone: Backbone, device: torch.device) -> None:
    """Split rank 0's model, of the same shape on every process, with torch's `fully_shard` over all processes.

    The Trainer leaves a model alone that was sharded at load time, which a private flag says (transformers 5.23; older
    ones would wrap it in DDP and fail). It can go when the Trainer asks the parameters instead.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = backbone.model
    processes = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (processes,))

    def placement(parameter: nn.Parameter) -> Shard:
        # A layer has few critical experts [N, out, in]: cut along N, most processes would hold none of them.
        along_n = parameter.ndim < 3 or parameter.shape[0] % processes == 0 or parameter.shape[1] % processes != 0
        return Shard(0 if along_n else 1)

    buffers_to(model, device)
    every = units(backbone)
    holders = Counter(id(parameter) for unit in every for parameter in unit.parameters())
    for unit in every:
        spread(unit.parameters(), device)
        # A tied embedding and head must be of one group: that of the whole model, which takes what is left.
        if all(holders[id(parameter)] == 1 for parameter in unit.parameters()):
            fully_shard(unit, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    model._is_distributed_loading_by_transformers = True


def shard_zero3(backbone: Backbone, zero_config: dict[str, Any], device: torch.device) -> None:
    """Partition rank 0's model, of the same shape on every process, as ZeRO-3 does, before its engine sees it.

    Left to `deepspeed.initialize`, the whole model would first be moved to every GPU. Forward passes outside of
    training gather one unit at a time.

    Args:
        zero_config: the `zero_optimization` part of the DeepSpeed configuration, without "auto".
    """
    from deepspeed.runtime.zero import Init

    # `Init` would replace torch's linear function for the whole process; leaf weights are freed without that.
    zero_config = {**zero_config, "memory_efficient_linear": False}
    buffers_to(backbone.model, device)
    Init(
        module=backbone.model,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_config},
    )
    setattr(backbone.model, GATHER, GatheredForward(units(backbone)))


class GatheredForward:
    """Gathers each unit of a ZeRO-3 model around its forward, for passes that DeepSpeed's engine does not run."""

    def __init__(self, modules: list[nn.Module]):
        self.active = True
        self._open: dict[int, ExitStack] = {}
        for module in modules:
            module.register_forward_pre_hook(self._gather)
            module.register_forward_hook(self._release, always_call=True)

    def _gather(self, module: nn.Module, _args: object) -> None:
        if self.active:
            self._open[id(module)] = stack = ExitStack()
            stack.enter_context(_zero3_whole(list(module.parameters())))

    def _release(self, module: nn.Module, _args: object, _output: object) -> None:
        stack = self._open.pop(id(module), None)
        if stack is not None:
            stack.close()


@contextmanager
def engine_runs(model: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed's engine gathers parameters itself."""
    gather: GatheredForward | None = getattr(model, GATHER, None)
    if gather is None:
        yield
        return
    gather.active = False
    try:
        yield
    finally:
        gather.active = True


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move the buffers alone: parameters go to the device when their unit is cut."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
