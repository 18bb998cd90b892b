"""Checkpoints to compare and to patch, and patches to spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from tests.organism import organism
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.model.load import skeleton
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.footprint import Footprint
from trainer.recipe.sections import ExportSection
from trainer.release.export import save_checkpoint
from trainer.release.patch import About, write_patch

__all__ = ["organism"]

Spoil = Callable[[Path, Path], object]
"""What is done to (base, patch)."""

Repaired = Callable[..., tuple[Path, Path, Footprint]]


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


def allowed(model: PreTrainedModel, experts: ExpertSet) -> Footprint:
    """The footprint of a repair: a set's experts and every router."""
    backbone = Backbone.of(model)
    return Footprint.of_experts(backbone, experts) | Footprint.of_routers(backbone)


@pytest.fixture
def repaired(tmp_path: Path) -> Repaired:
    """(base folder, exported folder, footprint) of a tiny model with two experts and all routers changed."""

    def made(
        family: str = "olmoe", *, dtype: torch.dtype = torch.float32, shards: str = "5GB", base_shards: str = "5GB"
    ) -> tuple[Path, Path, Footprint]:
        model = tiny_model(family, dtype=dtype)
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "base", ExportSection(max_shard_size=base_shards))
        experts = change(model, [(0, 1), (2, 7)])
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported", ExportSection(max_shard_size=shards))
        return tmp_path / "base", tmp_path / "exported", allowed(model, experts)

    return made


def patch_of(base: Path, exported: Path, out: Path, footprint: Footprint | None = None, **about: object) -> About:
    """Without a footprint everything may be touched."""
    made_of = {"base_name": str(base), "revision": None, "expert_set": None, "recipe_hash": "0" * 64, "versions": {}}
    if footprint is None:
        footprint = Footprint.everything(skeleton(AutoConfig.from_pretrained(exported)))
    return write_patch(base, exported, out, **made_of | {"footprint": footprint} | about)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reseal(change_about: Callable[[dict[str, Any]], object]) -> Spoil:
    """A `patch.json` with other content and a matching seal, as another program or release might write it."""

    def spoil(base: Path, patch: Path) -> None:
        content = json.loads((patch / "patch.json").read_text())
        del content["sha256"]
        change_about(content)
        try:
            text = About.model_validate(content).sealed()
        except ValueError:
            text = json.dumps(content)
        (patch / "patch.json").write_text(text)

    return spoil
