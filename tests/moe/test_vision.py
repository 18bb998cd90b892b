"""Models with a vision tower: their text experts are repaired on text, and they still see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.moe.families import FAMILIES, Family
from tests.tiny import tiny_tokenizer
from trainer.model.load import read_model
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.moe.footprint import Footprint
from trainer.moe.routing import record
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint

IMAGE, START, PATCHES = 60, 61, 4
"""Ids inside the vocabulary of the tests' tokenizer, and the patches of an image along each side."""


def seeing(family: Family) -> PreTrainedModel:
    model = family.build()
    model.config.image_token_id, model.config.vision_start_token_id = IMAGE, START
    return model


def inputs(model: PreTrainedModel, seed: int) -> dict[str, Any]:
    """A prompt with one image of random pixels; 2 x 2 patches become one token."""
    vision = model.config.vision_config
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = [2, 5, 6, START, *[IMAGE] * (PATCHES // vision.spatial_merge_size) ** 2, 7, 8, 3]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[int(i == IMAGE) for i in ids]]),
        "pixel_values": torch.randn(PATCHES**2, pixels, generator=torch.Generator().manual_seed(seed)),
        "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]]),
    }


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs(model, seed), use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.vision is not None], ids=lambda family: family.model_type)
def test_a_repaired_model_sees_with_the_tower_it_had(family: Family, tmp_path: Path) -> None:
    model = seeing(family)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    before = logits_of(model)
    assert not torch.allclose(before, logits_of(model, seed=1), atol=1e-3), "the image must matter"

    backbone = Backbone.of(model).check()
    with record(backbone) as trace:
        logits_of(model)
    first = backbone.layers[0]
    assert trace.index_TK[first.index].shape[0] == before.shape[1], "tokens of the image are routed, too"
    used = int(torch.bincount(trace.index_TK[first.index].reshape(-1)).argmax())
    experts = ExpertSet((Member(first.index, used),), {layer.index: layer.num_experts for layer in backbone})
    trained = SplitModel(backbone, experts)
    with torch.no_grad():
        for parameter in trained.trainable().values():
            parameter.add_(0.1)
    with trained.original() as original:
        assert torch.equal(logits_of(original.model), before)
    trained.fuse()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "repaired")

    audit = audit_files(tmp_path / "base", tmp_path / "repaired", Footprint.of_experts(backbone, experts))
    assert (audit["untouched_identical"], audit["experts_changed"]) == (True, 1)
    reloaded = read_model(tmp_path / "repaired", torch.float32)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert not torch.allclose(logits_of(model), before, atol=1e-3)
    tower = {
        name: p for name, p in read_model(tmp_path / "base", torch.float32).named_parameters() if "visual" in name
    }
    assert tower and all(torch.equal(p, reloaded.get_parameter(name)) for name, p in tower.items())
