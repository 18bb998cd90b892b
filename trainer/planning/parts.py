"""A model described from its configuration alone, built on torch's meta device: tensors have shapes but no bytes.

What is counted are the real modules: the model that transformers builds, found by `Backbone.of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from data_prep.errors import UserError
from trainer.model import load as loading
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import FusedExperts
from trainer.moe.footprint import Footprint
from trainer.moe.sharding import size
from trainer.recipe.sections import ModelSection

ATTENTION = ("attn", "attention", "conv", "mixer", "mamba")


@dataclass(frozen=True)
class Parts:
    """Parameters by part. `active`: those that one token passes, embeddings among them; `other`: norms mostly."""

    total: int
    active: int
    embeddings: int
    attention: int
    experts: int
    shared_experts: int
    routers: int
    dense_mlps: int
    other: int
    routed_experts: int
    """Number of routed experts."""
    critical_experts: int
    """Number of routed experts that the edit may change."""
    critical: int
    """Their parameters."""
    footprint: int
    """Parameters that the edit may change."""
    footprint_share: float
    trainable: dict[str, int]
    """Training stage -> parameters that it trains."""


def dtype_of(section: ModelSection, config: PreTrainedConfig) -> torch.dtype:
    """The type that weights are loaded in.

    Raises:
        UserError: `model.dtype` is auto and the configuration does not say.
    """
    if section.dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.dtype)
        return chosen
    said = config.dtype or config.get_text_config().dtype
    if said is None:
        raise UserError("model.dtype: found auto, but config.json names no dtype; set model.dtype=bfloat16, say")
    return said if isinstance(said, torch.dtype) else getattr(torch, str(said))


def skeleton(section: ModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, in the type that a run loads it in."""
    return loading.skeleton(config, dtype_of(section, config), trust_remote_code=section.trust_remote_code)


def on_meta(section: ModelSection, config: PreTrainedConfig, *, takes_dense: bool = False) -> Backbone:
    """The model's MoE layers, on the meta device; `takes_dense`: it may have none.

    Raises:
        ValueError: it has none.
    """
    return Backbone.of(skeleton(section, config), takes_dense=takes_dense)


def spread_evenly(number: int, backbone: Backbone) -> ExpertSet:
    """So many experts, as many in each MoE layer: what a plan takes for those that a run will choose.

    From the first layer on: what lies below the first chosen expert needs no gradient, so this is the worst case.
    """
    layers = len(backbone)
    wanted = [(number * (i + 1) + layers - 1) // layers - (number * i + layers - 1) // layers for i in range(layers)]
    members = (
        Member(layer.index, e)
        for layer, n in zip(backbone, wanted, strict=True)
        for e in range(min(n, layer.num_experts))
    )
    return ExpertSet(tuple(members), {layer.index: layer.num_experts for layer in backbone})


def would_change(footprint: Footprint, backbone: Backbone) -> dict[str, int]:
    """How many experts and parameters of a stock model may change, and of how many."""
    return {
        "experts": sum(footprint.experts(backbone).values()),
        "of_experts": backbone.total_experts,
        "parameters": footprint.parameters(backbone),
        "of_parameters": sum(size(parameter) for parameter in backbone.model.parameters()),
    }


def count(
    section: ModelSection,
    config: PreTrainedConfig,
    footprint_of: Callable[[Backbone], Footprint],
    *,
    takes_dense: bool = False,
) -> Parts:
    """Parameters by part; tied weights count once.

    Args:
        footprint_of: what the edit may change in the model (`Planned.footprint`).
    """
    backbone = on_meta(section, config, takes_dense=takes_dense)
    model, footprint = backbone.model, footprint_of(backbone)
    kinds: dict[int, str] = {}

    def put(module: nn.Module | None, kind: str) -> None:
        for parameter in module.parameters() if module is not None else ():
            kinds.setdefault(id(parameter), kind)

    put(model.get_input_embeddings(), "embeddings")
    put(model.get_output_embeddings(), "embeddings")
    for layer in backbone:
        put(layer.experts, "experts")
        put(layer.router, "routers")
        put(layer.shared, "shared_experts")
    sums = dict.fromkeys(("embeddings", "attention", "experts", "shared_experts", "routers", "dense_mlps", "other"), 0)
    for name, parameter in model.named_parameters():
        sums[kinds.get(id(parameter)) or _by_name(name, parameter.ndim)] += parameter.numel()
    passed = sum(layer.top_k * _one_expert(layer.experts) for layer in backbone)
    critical = footprint.experts(backbone)
    total, changing = sum(sums.values()), footprint.parameters(backbone)
    return Parts(
        total,
        total - sums["experts"] + passed,
        **sums,
        routed_experts=backbone.total_experts,
        critical_experts=sum(critical.values()),
        critical=sum(n * _one_expert(backbone.layer(index).experts) for index, n in critical.items()),
        footprint=changing,
        footprint_share=changing / total,
        trainable={},
    )


def _by_name(name: str, ndim: int) -> str:
    if any(word in name for word in ATTENTION):
        return "attention"
    if "shared_expert" in name:  # qwen's gate lies beside the shared expert, not in it
        return "shared_experts"
    return "dense_mlps" if ndim > 1 else "other"


def _one_expert(experts: FusedExperts) -> int:
    return sum(p.numel() for p in experts.parameters()) // int(experts.down_proj.shape[0])
