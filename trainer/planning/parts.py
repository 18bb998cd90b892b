"""A model described from its configuration alone, built on torch's meta device: tensors have shapes but no bytes.

What is counted are the real modules: the model that transformers builds, found by `Backbone.of` and split by
`SplitModel` as a run would.

Shapes: N critical experts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from data_prep.errors import UserError
from trainer.model import load as loading
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import FusedExperts, SplitModel
from trainer.moe.trainable import Trained, WholeModel
from trainer.recipe.schema import ModelSection, Recipe, check_shared_experts

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
    critical: int
    """Parameters of the critical experts."""
    trainable: dict[str, int]
    """Training stage -> parameters that it trains."""


def read_config(section: ModelSection) -> PreTrainedConfig:
    """The model's configuration, from its folder, the cache or the Hub.

    Raises:
        UserError: it is in none of these, or cannot be read.
    """
    name = section.name_or_path
    try:
        return AutoConfig.from_pretrained(name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.name_or_path: no configuration of {name!r}: neither a folder with a config.json nor in the cache, "
            f"nor could the Hub give it ({first})"
        ) from error


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


def critical_counts(recipe: Recipe, backbone: Backbone) -> list[int]:
    """How many experts of each MoE layer are taken for critical: `detect.top_k` of them, spread evenly.

    Raises:
        UserError: `detect.top_k` selects none or all of the model's experts.
    """
    sizes = [layer.num_experts for layer in backbone]
    top_k, total = recipe.detect.top_k, sum(sizes)
    k = round(top_k * total) if isinstance(top_k, float) else top_k
    if not 1 <= k < total:
        raise UserError(
            f"detect.top_k: {top_k} selects {k} experts; allowed: 1 to {total - 1} (the model has {total})"
        )
    layers = len(sizes)
    # From the first layer on: what lies below the first critical expert needs no gradient, so this is the worst case.
    wanted = [(k * (i + 1) + layers - 1) // layers - (k * i + layers - 1) // layers for i in range(layers)]
    return [min(n, size) for n, size in zip(wanted, sizes, strict=True)]


def under_repair(recipe: Recipe, backbone: Backbone, counts: Sequence[int]) -> Trained:
    """The model as the training stages hold it; `counts[i]` critical experts in MoE layer i."""
    if recipe.repair.scope == "full":
        return WholeModel(backbone)
    members = tuple(Member(layer.index, e) for layer, n in zip(backbone, counts, strict=True) for e in range(n))
    experts = ExpertSet(members, {layer.index: layer.num_experts for layer in backbone})
    if recipe.detect.shared_experts:
        check_shared_experts(recipe, backbone.model.config.model_type, backbone.shared_layers)
        experts = experts.with_shared(backbone.shared_layers)
    rank, alpha = recipe.repair.lora_rank, recipe.repair.lora_alpha
    return SplitModel(backbone, experts, lora_rank=rank, lora_alpha=alpha)


def count(recipe: Recipe, config: PreTrainedConfig) -> Parts:
    """Parameters by part; tied weights count once."""
    model = skeleton(recipe.model, config)
    backbone = Backbone.of(model)
    counts = critical_counts(recipe, backbone)
    named = dict(model.named_parameters())
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
    for name, parameter in named.items():
        sums[kinds.get(id(parameter)) or _by_name(name, parameter.ndim)] += parameter.numel()
    passed = sum(layer.top_k * _one_expert(layer.experts) for layer in backbone)
    critical = sum(n * _one_expert(layer.experts) for layer, n in zip(backbone, counts, strict=True))
    total = sum(sums.values())
    return Parts(
        total,
        total - sums["experts"] + passed,
        **sums,
        routed_experts=backbone.total_experts,
        critical_experts=sum(counts),
        critical=critical,
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
