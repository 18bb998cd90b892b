"""What a step needs besides weights and optimiser: the step itself, run on tensors without bytes and metered.

torch's FakeTensorMode runs the real modules on shapes alone. `Meter` watches which storages live, so that everything
autograd keeps, the casts of critical weights among it, is counted as it would be held. Every kind of decoder layer is
rehearsed and multiplied: a model of 60 layers takes no longer than one of three.

Shapes: B rows, S positions, V vocabulary, E experts, N critical experts of a layer, T = B x S tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.moe.backbone import Backbone
from trainer.moe.routing import record
from trainer.moe.trainable import Trained
from trainer.planning.parts import skeleton, under_repair
from trainer.recipe.schema import Recipe

aten = torch.ops.aten
Stage = Literal["detect", "saliency", "repair", "consistency", "evaluate"]


@dataclass(frozen=True)
class Transient:
    """Bytes of a step that come and go, gradients of parameters left out.

    `peak`: most at any time; `temporary`: most beyond what the forward pass left for the backward pass, which is what
    remains of it when the last gradients arrive.
    """

    peak: int
    temporary: int


@dataclass(frozen=True)
class Shape:
    """Rows and positions of one forward pass; of `rows`, the first `retained` are compared with the original model."""

    rows: int
    length: int
    retained: int = 0


class Meter(TorchDispatchMode):
    """Bytes of the storages made inside, and answers to the few questions that only data could answer.

    Args:
        known: storages that exist already, which are not counted.
        critical: E + N -> N, for every layer's sizes; rows are taken to fall evenly on all experts.
    """

    def __init__(self, known: Iterable[Tensor], critical: dict[int, int]):
        super().__init__()
        self._held = {id(t.untyped_storage()): t.untyped_storage() for t in known}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()
        self._critical = critical
        self._rows: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bincount.default:  # rows of each expert, in the split's forward
            slots = kwargs.get("minlength") or args[2]
            rows, critical = args[0].numel(), self._critical[slots]
            last = max(round(rows * critical / (slots - critical)), 1)
            self._rows = {slots - critical: rows - last, critical: last}
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


def rehearse(
    recipe: Recipe, config: PreTrainedConfig, counts: Sequence[int], stage: Stage, shape: Shape, checkpointing: bool
) -> Transient:
    """One step of a stage on the whole model, from steps on its kinds of layers.

    Args:
        counts: critical experts of each MoE layer.
    """
    kinds = _kinds(recipe, config, counts)
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in kinds}
    # Two of a kind: with one alone the peak may lie at another moment than in the whole model.
    base = sorted(i for found in places.values() for i in found[:2])
    measured = _on_layers(recipe, config, counts, base, stage, shape, checkpointing)
    total = list(measured)
    for found in places.values():
        if len(found) > 2:
            more = _on_layers(recipe, config, counts, sorted([*base, found[2]]), stage, shape, checkpointing)
            total = [t + (len(found) - 2) * (m - b) for t, m, b in zip(total, more, measured, strict=True)]
    forward, backward, start = total
    return Transient(max(forward, backward), max(backward - start, 0))


def _kinds(recipe: Recipe, config: PreTrainedConfig, counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """What makes two decoder layers alike: their modules, the kind of attention, the number of critical experts."""
    model = skeleton(recipe.model, config)
    backbone = Backbone.of(model)
    critical = {layer.index: n for layer, n in zip(backbone, counts, strict=True)}
    _, _, stack = _stack(model, backbone)
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(stack)
    return [
        (types[i], critical.get(i, 0), *((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for i, layer in enumerate(stack)
    ]


def _stack(model: nn.Module, backbone: Backbone) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of decoder layers, with the module that holds it and its name there."""
    modules = dict(model.named_modules())
    path = backbone.layers[0].experts_name.split(".")
    for i in range(1, len(path)):
        found = modules[".".join(path[:i])]
        if isinstance(found, nn.ModuleList):
            return modules[".".join(path[: i - 1])], path[i - 1], found
    raise ValueError(f"{backbone.layers[0].experts_name}: not inside a list of decoder layers")


def _on_layers(
    recipe: Recipe,
    config: PreTrainedConfig,
    counts: Sequence[int],
    layers: Sequence[int],
    stage: Stage,
    shape: Shape,
    checkpointing: bool,
) -> tuple[int, int, int]:
    """Peak of the forward pass and loss, peak of the backward pass, and what lives between them."""
    model = skeleton(recipe.model, config)
    whole = Backbone.of(model)
    kept = [n for layer, n in zip(whole, counts, strict=True) if layer.index in layers]
    _keep_layers(model, whole, layers)
    backbone = Backbone.of(model)
    trained = under_repair(recipe, backbone, kept) if stage not in ("detect", "saliency") else None
    modules = list(model.modules())
    if trained is not None:
        with trained.original() as original:
            modules += list(original.model.modules())
        for twin in trained.originals:
            modules += list(twin.modules())
            # torch cannot convert a module of fake tensors, and where these are it need not.
            vars(twin)["to"] = lambda *_: None
    if checkpointing:
        # Renamed in transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    fake = FakeTensorMode()
    known = _onto_fakes(modules, fake)
    meter = Meter(known, {layer.num_experts + n: n for layer, n in zip(backbone, kept, strict=True) if n})
    steps: dict[Stage, Callable[[], Tensor | None]] = {
        "detect": lambda: _replies(model, shape),
        "evaluate": lambda: _replies(model, shape),
        "saliency": lambda: _saliency(backbone, shape),
        "repair": lambda: _repair(_not_none(trained), recipe, shape),
        "consistency": lambda: _consistency(_not_none(trained), recipe, shape),
    }
    with fake, meter:
        loss = steps[stage]()
        forward = start = meter.peak
        if loss is not None:
            start = meter.peak = meter.live
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(meter.set_gradient_apart)
            loss.backward()
        return forward, meter.peak, start


def _not_none(trained: Trained | None) -> Trained:
    assert trained is not None
    return trained


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


# --- the steps, as the stages take them ----------------------------------------------------------


def _inputs(shape: Shape, rows: int | None = None) -> dict[str, Any]:
    ids_BS = torch.zeros(rows or shape.rows, shape.length, dtype=torch.long)
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


def _replies(model: PreTrainedModel, shape: Shape) -> None:
    """The longest forward pass of generation, with its cache."""
    with torch.no_grad():
        model(**_inputs(shape), use_cache=True, logits_to_keep=1)


def _saliency(backbone: Backbone, shape: Shape) -> Tensor:
    """`detection.saliency.refusal_loss` over all experts."""
    backbone.model.requires_grad_(False)
    for parameter in (*backbone.expert_parameters().values(), *backbone.shared_parameters().values()):
        parameter.requires_grad_(True)
    inputs = _inputs(shape)
    logits_BSV = backbone.model(**inputs, use_cache=False).logits
    targets_BR = inputs["input_ids"][:, 1:]
    loss: Tensor = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2).float(), targets_BR, reduction="none").mean()
    return loss


def _original_logits(trained: Trained, inputs: dict[str, Any], kept: int) -> Tensor:
    with trained.original() as original, record(original):
        logits: Tensor = original.model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return logits


def _repair(trained: Trained, recipe: Recipe, shape: Shape) -> Tensor:
    """`ExpertRepairTrainer.compute_loss` at a step that is logged, where the original runs on every row."""
    section = recipe.repair
    trained.train_experts(routers=section.train_gates)
    trained.model.train()
    inputs = _inputs(shape)
    replay = section.routing == "replay"
    original_BSV = _original_logits(trained, inputs, 0) if replay else None
    with record(trained.backbone):
        logits_BSV = trained.model(**inputs, use_cache=False, logits_to_keep=shape.length).logits
    logits_BRV, targets_BR = logits_BSV[:, :-1], inputs["input_ids"][:, 1:]
    if not replay:
        original_BSV = _original_logits(trained, inputs, 0)
    loss_BR = F.cross_entropy(logits_BRV.transpose(1, 2).float(), targets_BR, reduction="none")
    if shape.retained:
        chosen_B = torch.arange(shape.retained)
        current_BRV = logits_BRV[chosen_B]
        if replay:
            assert original_BSV is not None
            reference_BSV = original_BSV[chosen_B]
        else:
            reference_BSV = _original_logits(trained, _inputs(shape, shape.retained), shape.length)
        reference_BRV = torch.log_softmax(reference_BSV[:, :-1].float(), -1)
        kl_BR = (reference_BRV.exp() * (reference_BRV - torch.log_softmax(current_BRV.float(), -1))).sum(-1)
        loss_BR = loss_BR.index_copy(0, chosen_B, kl_BR)
    return loss_BR.sum(1).mean()


def _consistency(trained: Trained, recipe: Recipe, shape: Shape) -> Tensor:
    """`RoutingConsistencyTrainer.compute_loss`: two passes with gradients, whose graphs live together."""
    trained.train_routers()
    trained.model.train()
    inputs = _inputs(shape)
    terms: list[Tensor] = []
    for compared_with_original in (recipe.consistency.target == "original", True):
        if compared_with_original:
            with trained.original() as original, record(original) as target:
                original.model(**inputs, use_cache=False, logits_to_keep=1)
        else:
            with torch.no_grad(), record(trained.backbone) as target:
                trained.model(**inputs, use_cache=False, logits_to_keep=1)
        with record(trained.backbone, grad=True) as trace:
            trained.model(**inputs, use_cache=False, logits_to_keep=1)
        for i, logits_TE in trace.logits_TE.items():
            goal_TE, now_TE = (torch.log_softmax(t.float(), -1) for t in (target.logits_TE[i], logits_TE))
            terms.append((goal_TE.exp() * (goal_TE - now_TE)).sum(-1).mean())
        if recipe.consistency.benign_weight == 0:
            break
    return torch.stack(terms).mean()
