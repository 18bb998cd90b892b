"""Where routers, experts and layers are in any transformers 5 MoE, found by the library's own module contract.

The contract: an experts module decorated with `use_experts_implementation` holds fused 3-D tensors and is called with
`(hidden_TD, top_k_index_TK, top_k_weights_TK)`; its router returns `(logits_TE, top_k_weights_TK, top_k_index_TK)`.
`Backbone.of` finds both by structure, `Backbone.check` proves the contract numerically on a forward pass. The few
families that depart from it are named in `layouts`.

Shapes: T tokens, E experts, K chosen experts per token, D hidden size, F intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.moe.layouts import (
    ROUTER_NAMES,
    SELECTION_ONLY,
    SHARED_NAMES,
    TOP_K_NAMES,
    UNSUPPORTED,
    router_layout,
)
from trainer.moe.scoring import Scoring, identify

RouterOutput = tuple[Tensor, Tensor, Tensor]
"""What a router returns: (logits [T, E], top-k weights [T, K], top-k index [T, K])."""

LOW_TOKENS = 1000
"""Random probes are drawn below this id: the placeholders of images and video lie at the end of a vocabulary."""


@dataclass
class MoELayer:
    """One MoE layer. `index` is the position of its decoder layer in the model, dense layers counted.

    `shared`, `shared_name`: the expert beside the routed ones that every token passes.
    """

    index: int
    experts_name: str
    router_name: str
    router: nn.Module
    experts: nn.Module
    shared_name: str | None
    shared: nn.Module | None
    num_experts: int
    top_k: int
    scoring: Scoring | None = None

    @property
    def layout(self) -> str:
        """Layout of the fused expert tensors in words."""
        orientation = "[E, in, out]" if self.experts.is_transposed else "[E, out, in]"
        bias = ", biases" if self.experts.has_bias else ""
        return f"{orientation}{bias}"

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter of the shared expert; empty without one."""
        named = self.shared.named_parameters() if self.shared is not None else ()
        return {f"{self.shared_name}.{name}": parameter for name, parameter in named}

    def log_distribution(self, logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [T, E] (fp32) of the routing, as `Scoring` says; softmax's of an unknown family."""
        if self.scoring is None:
            return (logits_TE.float() / temperature).log_softmax(-1)
        return self.scoring.log_distribution(logits_TE, temperature)

    def read(self, output: RouterOutput) -> RouterOutput:
        """A router's raw output as (logits, top-k weights, top-k index); only gemma4's differs from its raw one."""
        first_TE, weights_TK, index_TK = output
        return router_layout(self.router).logits(first_TE), weights_TK, index_TK


def stored(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter `name` as it is held; reading a quantised one by its name would dequantise it."""
    held: Any = module
    parameter = held.parametrizations[name].original if is_parametrized(module, name) else getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def expert_tensor_names(experts: nn.Module) -> list[str]:
    """Names of the parameters of a fused experts module whose first dimension is the expert."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [up, "down_proj"]
    return names + [f"{name}_bias" for name in names] if experts.has_bias else names


def _is_experts(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and isinstance(down, Tensor)
        and down.ndim == 3
    )


def _layer_index(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    if not numbers:
        raise ValueError(f"MoE layer {name!r}: no layer number in the module's name")
    return int(numbers[0])


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    found = []
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            found.append(target)
    return tuple(set(found))


def _find_router(siblings: dict[str, nn.Module], classes: tuple[type, ...], num_experts: int) -> str | None:
    """Name of the router among the modules beside the experts: by recorded class, else by name and shape."""
    by_class = [name for name, module in siblings.items() if classes and isinstance(module, classes)]
    if len(by_class) == 1:
        return by_class[0]
    for name in ROUTER_NAMES:
        weight = getattr(siblings.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == num_experts:
            return name
    return None


def _top_k(router: nn.Module, config: PreTrainedConfig) -> int | None:
    known = [getattr(router, "top_k", None), *(getattr(config, name, None) for name in TOP_K_NAMES)]
    return next((int(value) for value in known if value), None)


class Backbone:
    """The MoE layers of a model, in order. Holds references to the model's modules, never copies.

    `beside`: name in the model -> module that trains whole beside split experts, while they are split out.
    """

    def __init__(self, model: PreTrainedModel, layers: list[MoELayer]):
        self.model = model
        self.layers = layers
        self.beside: dict[str, nn.Module] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, *, takes_dense: bool = False) -> Backbone:
        """Find the MoE layers of `model`; `takes_dense`: a dense model is a backbone without any.

        Raises:
            ValueError: no experts module, an experts module without a router, or a family that cannot be supported;
                the message says what was missing or why.
        """
        kind = getattr(model.config, "model_type", type(model).__name__)
        modules = dict(model.named_modules())
        classes = _router_classes(model)
        layers = []
        for name, experts in modules.items():
            if type(experts).__name__ in UNSUPPORTED:
                raise ValueError(f"model type {kind!r} is not supported: {UNSUPPORTED[type(experts).__name__]}")
            if not _is_experts(experts):
                continue
            parent = name.rpartition(".")[0]
            siblings = dict(modules[parent].named_children())
            num_experts = experts.down_proj.shape[0]
            router_name = _find_router(siblings, classes, num_experts)
            if router_name is None:
                raise ValueError(
                    f"model type {kind!r}: no router beside the experts module {name!r} "
                    f"(looked among: {', '.join(sorted(siblings))})"
                )
            router = siblings[router_name]
            own_name = next((n for n in SHARED_NAMES if n in siblings), None)
            shared = siblings[own_name] if own_name else None
            shared_name = f"{parent}.{own_name}" if own_name and parent else own_name
            top_k = _top_k(router, model.config.get_text_config())
            if top_k is None:
                raise ValueError(f"model type {kind!r}: router {parent}.{router_name} does not say its top_k")
            router_path = f"{parent}.{router_name}" if parent else router_name
            index = _layer_index(name)
            layers.append(MoELayer(index, name, router_path, router, experts, shared_name, shared, num_experts, top_k))
        if not layers and not (takes_dense and _is_dense(model, bool(classes))):
            raise ValueError(_why_no_experts(model, kind, bool(classes)))
        return cls(model, layers)

    def __iter__(self) -> Iterator[MoELayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> MoELayer:
        """The MoE layer at decoder layer `index`."""
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise ValueError(f"layer {index} is not an MoE layer; MoE layers: {[layer.index for layer in self.layers]}")

    @property
    def total_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    def routers(self) -> dict[str, nn.Module]:
        """Name in the model -> router."""
        return {layer.router_name: layer.router for layer in self.layers}

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for every router; selection biases, which no gradient reaches, left out."""
        return {
            f"{layer.router_name}.{name}": parameter
            for layer in self.layers
            for name, parameter in layer.router.named_parameters()
            if not name.endswith(SELECTION_ONLY)
        }

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> fused parameter [E, ...], for every experts module; packed bytes where quantised."""
        return {
            f"{layer.experts_name}.{name}": stored(layer.experts, name)
            for layer in self.layers
            for name in expert_tensor_names(layer.experts)
        }

    @property
    def shared_layers(self) -> list[int]:
        """Indices of the layers with a shared expert."""
        return [layer.index for layer in self.layers if layer.shared is not None]

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for every shared expert."""
        return {name: parameter for layer in self.layers for name, parameter in layer.shared_parameters().items()}

    @torch.no_grad()
    def check(self, num_tokens: int = 16) -> Backbone:
        """Prove the contract on one forward pass of random tokens and identify each router's scoring family.

        Raises:
            ValueError: a router whose output breaks the contract (among it probabilities instead of logits, as in
                transformers before 5.6), experts called with something else than the router's output, or logits that
                are not finite. A scoring
                family that cannot be reproduced is no error (`scoring` stays None): routing can be recorded but not
                pinned.
        """
        routed: dict[int, RouterOutput] = {}
        called: dict[int, tuple[Tensor, ...]] = {}
        handles = []
        for layer in self.layers:
            handles.append(layer.router.register_forward_hook(_keep(routed, layer)))
            handles.append(layer.experts.register_forward_pre_hook(_keep_call(called, layer), with_kwargs=True))
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        vocabulary = min(self.model.get_input_embeddings().weight.shape[0], LOW_TOKENS)
        ids = torch.randint(vocabulary, (2, num_tokens // 2), generator=generator).to(self.model.device)
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        if not torch.isfinite(logits).all():
            raise ValueError(
                f"the model's logits are NaN or infinite on {ids.numel()} random tokens, in {logits.dtype}: its "
                "weights are damaged, or its type is too narrow; try bfloat16 or float32"
            )
        for layer in self.layers:
            _check_layer(layer, routed.get(layer.index), called.get(layer.index), ids.numel())
        return self

    def adopt(self, scorings: Sequence[Scoring | None]) -> Backbone:
        """Take over what `check` found on another process, layer by layer, for the same model."""
        for layer, scoring in zip(self.layers, scorings, strict=True):
            factor = router_layout(layer.router).factor
            own_E = getattr(layer.router, factor) if factor else None
            layer.scoring = None if scoring is None else replace(scoring, factor_E=own_E)
        return self


def _keep(store: dict[int, RouterOutput], layer: MoELayer):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, _args: object, output: RouterOutput) -> None:
        store[layer.index] = output

    return hook


def _keep_call(store: dict[int, tuple[Tensor, ...]], layer: MoELayer):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        store[layer.index] = (*args, *kwargs.values())

    return hook


def _check_layer(layer: MoELayer, routed: RouterOutput | None, called: tuple[Tensor, ...] | None, tokens: int) -> None:
    where = f"layer {layer.index} ({layer.router_name})"
    if routed is None or called is None:
        raise ValueError(f"{where}: its {'router' if routed is None else 'experts'} did not run in a forward pass")
    if not (isinstance(routed, tuple) and len(routed) == 3 and all(isinstance(t, Tensor) for t in routed)):
        raise ValueError(
            f"{where}: router must return (logits, top-k weights, top-k index), got {type(routed).__name__}"
        )
    first, weights, index = routed
    found = [tuple(t.shape) for t in routed]
    wanted = [(tokens, layer.num_experts), (tokens, layer.top_k), (tokens, layer.top_k)]
    if found != wanted or index.is_floating_point():
        raise ValueError(
            f"{where}: router output shapes {found} and index type {index.dtype}, expected {wanted} and integers"
        )
    if index.min() < 0 or index.max() >= layer.num_experts:
        raise ValueError(f"{where}: router chose expert {int(index.max())} of {layer.num_experts}")
    given = [t for t in called if isinstance(t, Tensor)]
    if not any(t.shape == index.shape and torch.equal(t, index) for t in given if not t.is_floating_point()):
        raise ValueError(f"{where}: the experts are not called with the router's own indices")
    layout, router = router_layout(layer.router), layer.router
    if _are_probabilities(first) is not layout.returns_probabilities:
        raise ValueError(
            f"{where}: router returned {'logits' if layout.returns_probabilities else 'probabilities'} where "
            f"{type(router).__name__} is known to return the other; this transformers version is not supported"
        )
    layer.scoring = identify(
        layout.logits(first),
        weights,
        index,
        declared_scale=float(getattr(router, "routed_scaling_factor", 1.0)),
        jitter=float(getattr(router, layout.jitter)) if layout.jitter else None,
        factor_E=getattr(router, layout.factor) if layout.factor else None,
    )


def _are_probabilities(first_TE: Tensor) -> bool:
    sums_T = first_TE.float().sum(-1)
    return bool((first_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-2)


def _is_dense(model: nn.Module, has_router: bool) -> bool:
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("experts")]
    return not lists and not has_router


def _why_no_experts(model: nn.Module, kind: str, has_router: bool) -> str:
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("experts")]
    if lists:
        return (
            f"model type {kind!r}: experts are a ModuleList ({lists[0]}), not fused 3-D tensors; "
            "only architectures ported to transformers 5 are supported (remote code is not)"
        )
    if has_router:
        return f"model type {kind!r}: routers but no fused experts found (3-D down_proj with has_gate, is_transposed)"
    return f"model type {kind!r} is dense: no router and no experts module found; allowed: a Mixture-of-Experts model"
