"""Attention that trains beside critical experts or alone: those projections move, no other bit does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from tests.moe.families import FAMILIES, Family
from tests.moe.test_families import ONE_STEP, REPAIR_ROWS, critical_experts, logits_of, snapshot
from tests.tiny import tiny_chat, tiny_model, tiny_tokenizer
from trainer.moe.attention import projections
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.recipe.sections import AttentionSection, RepairSection
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint
from trainer.training.repair import repair_experts
from trainer.training.under_repair import trained_attention, trained_experts, under_repair

CASES = [(family, "experts") for family in FAMILIES]
CASES += [(family, "attention") for family in FAMILIES if family.model_type in ("qwen3_moe", "qwen3_next", "lfm2_moe")]


@pytest.mark.parametrize(("family", "scope"), CASES, ids=lambda one: getattr(one, "model_type", one))
def test_attention_trains_alone_or_beside_experts_and_nothing_else_moves(
    family: Family, scope: str, tmp_path: Path
) -> None:
    model = family.build()
    dtype = torch.bfloat16 if scope == "experts" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    expected, before = logits_of(model), snapshot(model)
    backbone = Backbone.of(model).check()
    section = RepairSection(**{**ONE_STEP, "max_steps": 2}, scope=scope, attention=AttentionSection(layers=0.5))
    experts = critical_experts(backbone)
    layers = list(projections(backbone))
    attention = trained_attention(backbone, section)
    assert attention and all(any(f".{layer}." in name for layer in layers[:2]) for name in attention)
    trained = under_repair(backbone, experts, section)
    assert {p.dtype for p in trained.trainable().values()} == {torch.float32}
    repair_experts(trained, tiny_chat(), REPAIR_ROWS, section, tmp_path, 0)
    repaired = logits_of(model)
    with trained.original() as original:
        assert torch.equal(logits_of(original.model), expected)
    stock = dict(trained.stock_state())
    trained.fuse()
    after = model.state_dict()
    assert after.keys() == before.keys() == stock.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], stock[name]) for name in after)
    torch.testing.assert_close(logits_of(model), repaired, atol=2e-5 if dtype == torch.float32 else 5e-2, rtol=1e-4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_attention = {f"{name}.{own}" for name, module in attention.items() for own, _ in module.named_parameters()}
    assert moved & of_attention
    assert moved <= of_attention | (set(backbone.expert_parameters()) if scope == "experts" else set())

    save_checkpoint(model, tiny_tokenizer(), tmp_path / "repaired")
    footprint = Footprint.of_experts(backbone, trained_experts(experts, section))
    audit = audit_files(tmp_path / "base", tmp_path / "repaired", footprint | Footprint.of(of_attention))
    assert audit["untouched_identical"], audit["moved_outside"]
    assert not audit["not_moved"]
    assert bool(audit["experts_changed"]) == (scope == "experts")
    without = audit_files(tmp_path / "base", tmp_path / "repaired", footprint)
    assert without["moved_outside"]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"projections": ["w_q"]}, r"repair.attention.projections: found \['w_q'\], allowed: q_proj, k_proj"),
        ({"layers": [0, 7]}, r"repair.attention.layers: found \[7\], allowed: layers with attention, \[0, 1, 2\]"),
    ],
)
def test_attention_that_the_model_does_not_have_is_refused(attention: dict[str, object], message: str) -> None:
    section = RepairSection(attention=AttentionSection.model_validate(attention))
    with pytest.raises(UserError, match=message):
        trained_attention(Backbone.of(tiny_model()), section)


def test_projections_are_taken_by_name_and_layers_from_the_lowest_on() -> None:
    backbone = Backbone.of(tiny_model())

    def chosen(**attention: object) -> list[str]:
        section = RepairSection(attention=AttentionSection.model_validate(attention))
        return [name.removeprefix("model.layers.") for name in trained_attention(backbone, section)]

    assert chosen(projections=["o_proj"], layers=[2, 0]) == ["2.self_attn.o_proj", "0.self_attn.o_proj"]
    assert chosen(projections=["q_proj", "v_proj"], layers=0.3) == ["0.self_attn.q_proj", "0.self_attn.v_proj"]
    assert len(chosen()) == 12
