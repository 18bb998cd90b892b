"""What a step needs besides weights and optimiser: the step itself, run on tensors without bytes and metered.

torch's FakeTensorMode runs the real modules on shapes alone. `Meter` watches which storages live, so that everything
autograd keeps, the casts of critical weights among it, is counted as it would be held. Every kind of decoder layer is
rehearsed and multiplied: a model of 60 layers takes no longer than one of three.

Shapes: E experts of a layer, N of them split out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from trainer.engines.memory import Transient
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import decoder_layers
from trainer.planning.planned import PlannedStage

aten = torch.ops.aten
Build = Callable[[], Backbone]
"""Makes the stock model anew, on the meta device."""


class Meter(TorchDispatchMode):
    """Bytes of the storages made inside, and answers to the few questions that only data could answer.

    Args:
        known: storages that exist already, which are not counted.
        split: E + N -> N, for every layer's sizes; rows are taken to fall evenly on all experts.
    """

    def __init__(self, known: Iterable[Tensor], split: dict[int, int]):
        super().__init__()
        self._held = {id(t.untyped_storage()): t.untyped_storage() for t in known}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()
        self._split = split
        self._rows: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bincount.default:  # rows of each expert, in the split's forward
            slots = kwargs.get("minlength") or args[2]
            rows, own = args[0].numel(), self._split[slots]
            last = max(round(rows * own / (slots - own)), 1)
            self._rows = {slots - own: rows - last, own: last}
            self._next = rows - last
            out: Any = torch.empty(slots, dtype=torch.int64)
        elif func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self._next
        elif func is aten._grouped_mm.default:  # its fake kernel knows bf16 alone
            out = _grouped_mm(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        elif func is aten.repeat_interleave.Tensor:
            out = torch.empty(self._rows[args[0].numel()], dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._held or key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            if key in self._gradients:
                self._gradients.remove(key)
            else:
                self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def set_gradient_apart(self, parameter: Tensor) -> None:
        """Hook: a gradient is the engine's business from here on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) in self._seen and id(storage) not in self._gradients:
            self._gradients.add(id(storage))
            self.live -= storage.nbytes()


def _grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if left.ndim == right.ndim == 2:  # the gradient of the weights
        return left.new_empty(offsets.numel(), left.shape[0], right.shape[1])
    return left.new_empty(left.shape[-2], right.shape[-1])


def rehearse(build: Build, stage: PlannedStage, *, checkpointing: bool) -> Transient:
    """One step of a stage on the whole model, from steps on its kinds of layers."""
    kinds = _kinds(build, stage)
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in kinds}
    # Two of a kind: with one alone the peak may lie at another moment than in the whole model.
    base = sorted(i for found in places.values() for i in found[:2])
    measured = _on_layers(build, stage, base, checkpointing)
    total = list(measured)
    for found in places.values():
        if len(found) > 2:
            more = _on_layers(build, stage, sorted([*base, found[2]]), checkpointing)
            total = [t + (len(found) - 2) * (m - b) for t, m, b in zip(total, more, measured, strict=True)]
    forward, backward, start = total
    return Transient(max(forward, backward), max(backward - start, 0))


def _kinds(build: Build, stage: PlannedStage) -> list[tuple[Any, ...]]:
    """What makes two decoder layers alike: the kind of attention, and every parameter as the stage holds it."""
    backbone = build()
    stage.hold(backbone)
    _, _, stack = _stack(backbone.model, backbone)
    types = getattr(backbone.model.config.get_text_config(), "layer_types", None) or [None] * len(stack)
    return [
        (types[i], *((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()))
        for i, layer in enumerate(stack)
    ]


def _stack(model: nn.Module, backbone: Backbone) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of decoder layers, with the module that holds it and its name there."""
    modules = dict(model.named_modules())
    path = next(iter(decoder_layers(backbone))).rpartition(".")[0]
    holder, _, name = path.rpartition(".")
    stack = modules[path]
    assert isinstance(stack, nn.ModuleList)
    return modules[holder], name, stack


def _on_layers(build: Build, stage: PlannedStage, layers: Sequence[int], checkpointing: bool) -> tuple[int, int, int]:
    """Peak of the forward pass and loss, peak of the backward pass, and what lives between them."""
    backbone = build()
    model, held = backbone.model, stage.hold(backbone)
    _keep_layers(model, backbone, layers)
    modules = list(model.modules())
    if not isinstance(held, Backbone):
        with held.original() as original:
            if original.model is not model:
                _keep_layers(original.model, original, layers)
                modules += list(original.model.modules())
        for twin in held.originals:
            modules += list(twin.modules())
            # torch cannot convert a module of fake tensors, and where these are it need not.
            vars(twin)["to"] = lambda *_: None
    if checkpointing:
        # Renamed in transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    fake = FakeTensorMode()
    known = _onto_fakes(modules, fake)
    split = {layer.num_experts + n: n for layer in backbone if (n := getattr(layer.experts, "split_size", 0))}
    with fake, Meter(known, split) as meter:
        loss = stage.step(held)
        forward = start = meter.peak
        if loss is not None:
            start = meter.peak = meter.live
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(meter.set_gradient_apart)
            loss.backward()
        return forward, meter.peak, start


def _keep_layers(model: PreTrainedModel, backbone: Backbone, layers: Sequence[int]) -> None:
    """Cut the model down to some of its decoder layers; its configuration, too, for masks and caches follow it."""
    parent, name, stack = _stack(model, backbone)
    kept = nn.ModuleList(stack[i] for i in layers)
    setattr(parent, name, kept)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
    for config in {
        id(c): c for c in (model.config.get_text_config(), getattr(parent, "config", model.config))
    }.values():
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in layers]
        config.num_hidden_layers = len(layers)


def _onto_fakes(modules: Iterable[nn.Module], fake: FakeTensorMode) -> list[Tensor]:
    """Replace meta tensors by fake ones on the CPU, for which kernels are chosen as on a real device."""
    made: dict[int, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = fake.fake_tensor_converter.from_meta_and_device(fake, tensor.detach(), torch.device("cpu"))
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in modules:
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.is_meta:
                    held[name] = convert(value)  # type: ignore[assignment]
    return list(made.values())
