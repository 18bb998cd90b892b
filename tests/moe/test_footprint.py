"""A footprint adds up, covers what it names, and counts what it holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.moe.families import FAMILIES as EVERY_FAMILY
from tests.tiny import FAMILIES, NUM_EXPERTS, tiny_model
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.footprint import Footprint
from trainer.moe.quantised import quantise

NAMES, ROWS = ("a", "b", "c"), range(4)
some_rows = st.none() | st.frozensets(st.sampled_from(ROWS))
footprints = st.dictionaries(st.sampled_from(NAMES), some_rows).map(Footprint)


def cells(footprint: Footprint) -> set[tuple[str, int]]:
    """Every (tensor, row) that may change, asked one by one."""
    return {(name, row) for name in NAMES for row in ROWS if footprint.covers(name, [row])}


@given(one=footprints, other=footprints, third=footprints)
def test_the_sum_of_footprints_holds_what_one_of_them_holds(
    one: Footprint, other: Footprint, third: Footprint
) -> None:
    assert cells(one | other) == cells(one) | cells(other)
    assert set(one | other) == set(one) | set(other)
    assert one | other == other | one and (one | other) | third == one | (other | third)
    assert one | one == one and one | Footprint() == one


@given(footprint=footprints, name=st.sampled_from(NAMES), rows=st.sets(st.integers(0, 6)))
def test_rows_are_covered_where_each_of_them_is(footprint: Footprint, name: str, rows: set[int]) -> None:
    assert footprint.covers(name, rows) == all(footprint.covers(name, [row]) for row in rows)
    if name in footprint and footprint.rows[name] is None:
        assert footprint.covers(name, rows)
    if name not in footprint:
        assert footprint.covers(name, rows) is not bool(rows)


def by_hand(model: PreTrainedModel, footprint: Footprint) -> int:
    """True values in a mask over each parameter."""
    masks = {parameter: torch.zeros_like(parameter, dtype=torch.bool) for parameter in model.parameters()}
    for name, rows in footprint.rows.items():
        masks[model.get_parameter(name)][slice(None) if rows is None else sorted(rows)] = True
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("tied", [False, True])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_parameters_are_counted_as_by_hand(tied: bool, data: st.DataObject) -> None:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = {
        name: data.draw(st.none() | st.frozensets(st.integers(0, len(parameters[name]) - 1)))
        for name in data.draw(st.sets(st.sampled_from(sorted(parameters))))
    }
    footprint = Footprint(rows)
    assert footprint.parameters(Backbone.of(model)) == by_hand(model, footprint)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_routers_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    backbone = Backbone.of(model)
    experts = ExpertSet((Member(0, 1), Member(0, 3), Member(2, 7)), {0: 8, 1: 8, 2: 8})
    footprint = Footprint.of_experts(backbone, experts)
    fused = sum(parameter.numel() for parameter in backbone.expert_parameters().values())
    assert footprint.parameters(Backbone.of(model)) == fused // 24 * 3
    routers = sum(parameter.numel() for parameter in backbone.router_parameters().values())
    assert (footprint | Footprint.of_routers(backbone)).parameters(backbone) == fused // 24 * 3 + routers
    assert Footprint.everything(model).parameters(Backbone.of(model)) == model.num_parameters()


def test_a_shared_expert_is_held_whole_where_the_set_names_it() -> None:
    family = next(family for family in EVERY_FAMILY if family.shared)
    backbone = Backbone.of(family.build())
    first = backbone.layers[0]
    experts = ExpertSet((Member(first.index, 1),), {layer.index: layer.num_experts for layer in backbone})
    without = Footprint.of_experts(backbone, experts)
    footprint = Footprint.of_experts(backbone, experts.with_shared([first.index]))
    assert set(footprint) - set(without) == set(first.shared_parameters())
    assert all(footprint.rows[name] is None for name in first.shared_parameters())


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
    backbone = Backbone.of(tiny_model("qwen3_moe"))
    chosen = Footprint.of_experts(backbone, ExpertSet((Member(1, 3),), dict.fromkeys(range(3), NUM_EXPERTS)))
    before = chosen.parameters(backbone)
    quantise(backbone, "4bit", torch.device("cpu"))
    assert chosen.parameters(backbone) == before > 0
