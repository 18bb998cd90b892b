"""Checkpoints to compare and to patch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.organism import organism
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.release.export import save_checkpoint

__all__ = ["organism"]

Repaired = Callable[..., tuple[Path, Path, ExpertSet]]


@torch.no_grad()
def change(model: PreTrainedModel, pairs: list[tuple[int, int]]) -> ExpertSet:
    """Move these experts, given as (layer, expert), and every router of a model."""
    backbone = Backbone.of(model)
    fused = backbone.expert_parameters()
    for layer, expert in pairs:
        for name in fused:
            if name.startswith(backbone.layer(layer).experts_name + "."):
                fused[name][expert] += 0.1
    for parameter in backbone.router_parameters().values():
        parameter += 0.1
    sizes = {layer.index: layer.num_experts for layer in backbone}
    return ExpertSet(tuple(Member(*pair) for pair in pairs), sizes)


@pytest.fixture
def repaired(tmp_path: Path) -> Repaired:
    """(base folder, exported folder, expert set) of a tiny model with two experts and all routers changed."""

    def made(
        family: str = "olmoe", *, dtype: torch.dtype = torch.float32, shards: str = "5GB", base_shards: str = "5GB"
    ) -> tuple[Path, Path, ExpertSet]:
        model = tiny_model(family, dtype=dtype)
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "base", max_shard_size=base_shards)
        experts = change(model, [(0, 1), (2, 7)])
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported", max_shard_size=shards)
        return tmp_path / "base", tmp_path / "exported", experts

    return made
