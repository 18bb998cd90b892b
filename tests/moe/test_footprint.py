"""A footprint names tensors and rows; what it holds is counted on the stock model."""

from __future__ import annotations

import pytest

from tests.tiny import FAMILIES, NUM_EXPERTS, tiny_model
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.footprint import Footprint


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_experts_are_counted_by_layer_and_by_parameters(family: str) -> None:
    backbone = Backbone.of(tiny_model(family))
    members = (Member(0, 1), Member(0, 5), Member(2, 7))
    chosen = Footprint.of_experts(backbone, ExpertSet(members, dict.fromkeys(range(3), NUM_EXPERTS)))
    assert chosen.experts(backbone) == {0: 2, 2: 1}
    of_one = sum(p.numel() for p in backbone.expert_parameters().values()) // (3 * NUM_EXPERTS)
    assert chosen.parameters(backbone) == 3 * of_one
    routers = sum(p.numel() for p in backbone.router_parameters().values())
    assert (chosen | Footprint.of_routers(backbone)).parameters(backbone) == 3 * of_one + routers


def test_everything_is_every_expert_and_every_parameter() -> None:
    backbone = Backbone.of(tiny_model())
    every = Footprint.everything(backbone.model)
    assert every.experts(backbone) == dict.fromkeys(range(3), NUM_EXPERTS)
    assert every.parameters(backbone) == sum(p.numel() for p in backbone.model.parameters())
    assert Footprint().experts(backbone) == {} and Footprint().parameters(backbone) == 0


def test_packed_experts_count_as_what_they_pack() -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    from trainer.moe.quantised import quantise

    backbone = Backbone.of(tiny_model("qwen3_moe"))
    chosen = Footprint.of_experts(backbone, ExpertSet((Member(1, 3),), dict.fromkeys(range(3), NUM_EXPERTS)))
    before = chosen.parameters(backbone)
    quantise(backbone, "4bit", torch.device("cpu"))
    assert chosen.parameters(backbone) == before > 0
