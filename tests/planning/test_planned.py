"""What methods tell the planner, and that a method which is none of ours is planned from what it tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.errors import UserError
from tests.planning.measure import recipe as small_recipe
from tests.tiny import NUM_EXPERTS, NUM_LAYERS, tiny_model
from trainer.engines.memory import ENGINES
from trainer.methods.rasa.plan import planned as rasa_planned
from trainer.methods.rasa.plan import would_change
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.methods.steermoe.plan import planned as steermoe_planned
from trainer.methods.steermoe.recipe import SteermoeRecipe
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.planning import parts
from trainer.planning.plan import Plan, plan
from trainer.planning.planned import Held, PlannedStage, Saving, Training
from trainer.planning.savings import single_rows
from trainer.planning.steps import replies
from trainer.recipe.schema import Recipe
from trainer.recipe.sections import RepairSection

TREE: dict[str, Any] = {"run": {"name": "x"}, "model": {"name_or_path": "x", "dtype": "float32"}}
LENGTH = 12


class ThirdRecipe(Recipe):
    tune: RepairSection


class Third:
    """Trains the attention outputs of every second layer, in place."""

    def __init__(self, recipe: ThirdRecipe):
        self.recipe = recipe

    def stages(self) -> list[PlannedStage]:
        section = self.recipe.tune

        def step(held: Held) -> Tensor:
            ids = torch.zeros(section.trainer_arguments["per_device_train_batch_size"], LENGTH, dtype=torch.long)
            loss: Tensor = held.model(input_ids=ids, use_cache=False).logits.float().mean()
            return loss

        tune = PlannedStage("tune", step, self.hold, Training(section, rows=40, length=LENGTH, rounds=1))
        return [tune, PlannedStage("evaluate", replies(2, LENGTH), copies=1)]

    def hold(self, backbone: Backbone) -> Backbone:
        chosen = self.footprint(backbone)
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return backbone

    def footprint(self, backbone: Backbone) -> Footprint:
        layers = range(0, backbone.model.config.num_hidden_layers, 2)
        return Footprint.of(f"model.layers.{i}.self_attn.o_proj.weight" for i in layers)

    def savings(self) -> Iterator[Saving]:
        for words, recipe, changed in single_rows(self.recipe, ["tune"]):
            yield Saving(words, Third(recipe), changed)


@pytest.fixture(scope="module")
def third() -> Plan:
    recipe = ThirdRecipe.of({**TREE, "method": "third", "data": {}, "tune": {"max_steps": 3}}, source="x")
    return plan(recipe, Third(recipe), tiny_model().config, gpus=2)


def test_a_method_of_its_own_stages_is_planned(third: Plan) -> None:
    outputs = 2 * 32 * 32
    assert third.parts.trainable == {"tune": outputs} and third.parts.footprint == outputs
    assert third.parts.critical_experts == third.parts.critical == 0
    (steps,) = third.steps()
    assert (steps.rows, steps.steps, steps.tokens) == (40, 3, 3 * 16 * 2 * LENGTH)
    for engine in ENGINES:
        tune, evaluate = third.stages(engine)
        assert (tune.stage, evaluate.stage) == ("tune", "evaluate")
        assert evaluate.gradients == evaluate.optimizer == 0
    ddp, evaluated = third.stages("ddp")
    assert ddp.buffers == 4 * outputs and ddp.optimizer == 2 * 4 * outputs and ddp.beside == 0
    assert evaluated.beside == evaluated.weights >= 4 * third.parts.total


def test_layers_that_train_otherwise_are_rehearsed_apart(third: Plan) -> None:
    """Of three layers, the gradient passes all from the lowest chosen one up: the first."""
    assert third.stages("single")[0].activations > third.stages("single")[1].activations


def test_a_method_s_own_savings_are_the_advice(third: Plan) -> None:
    assert third.advice()[0].startswith("tune.per_device_train_batch_size=1 (with gradient_accumulation_steps=16): ")


def test_steering_trains_nothing_and_changes_nothing() -> None:
    data = {"harmful": {"path": "x", "train": "0:1", "test": "1:2"}}
    data["jailbreaks"] = {"path": "x", "seen": ["a"], "unseen": ["b"]}  # type: ignore[dict-item]
    recipe = SteermoeRecipe.of({**TREE, "method": "steermoe", "data": data}, source="x")
    found = plan(recipe, steermoe_planned(recipe), tiny_model().config, gpus=1, gpu_memory_gb=80)
    assert [stage.stage for stage in found.stages("single")] == ["detect", "evaluate"]
    assert found.parts.trainable == {} and found.steps() == []
    assert found.parts.footprint == found.parts.critical_experts == found.parts.critical == 0
    assert found.recommended is not None and not found.recommended.checkpointing
    backbone = Backbone.of(tiny_model())
    assert parts.would_change(steermoe_planned(recipe).footprint(backbone), backbone)["parameters"] == 0


def repaired(**keys: dict[str, Any]) -> RasaRecipe:
    recipe = small_recipe({"full"})
    for name, section in keys.items():
        recipe = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=section)})
    return recipe


def test_a_repair_would_change_its_experts_and_the_routers() -> None:
    backbone = Backbone.of(tiny_model())
    total = sum(p.numel() for p in backbone.model.parameters())
    of_one = sum(p.numel() for p in backbone.expert_parameters().values()) // (NUM_LAYERS * NUM_EXPERTS)
    routers = sum(p.numel() for p in backbone.router_parameters().values())
    known = {"of_experts": NUM_LAYERS * NUM_EXPERTS, "of_parameters": total}
    both = would_change(repaired(detect={"top_k": 5}), backbone)
    assert both == {"experts": 5, "parameters": 5 * of_one + routers, **known}
    experts_alone = would_change(repaired(detect={"top_k": 5}, consistency={"enabled": False}), backbone)
    assert experts_alone == {"experts": 5, "parameters": 5 * of_one, **known}
    whole = would_change(repaired(detect={"top_k": 5}, repair={"scope": "full"}), backbone)
    assert whole == {"experts": known["of_experts"], "parameters": total, **known}


@pytest.mark.parametrize(
    ("detect", "message"),
    [
        ({"top_k": 24}, r"detect\.top_k: 24 selects 24 experts; allowed: 1 to 23"),
        ({"top_k": 4, "shared_experts": True}, r"detect\.shared_experts: found true, but olmoe has no shared experts"),
    ],
)
@pytest.mark.parametrize("scope", ["experts", "full"])
def test_what_the_model_does_not_have_is_refused(detect: dict[str, Any], message: str, scope: str) -> None:
    with pytest.raises(UserError, match=message):
        would_change(repaired(detect=detect, repair={"scope": scope}), Backbone.of(tiny_model()))


def test_a_recipe_without_a_limit_of_length_can_be_inspected_but_not_planned() -> None:
    recipe = repaired(detect={"top_k": 5}, repair={"max_length": None})
    assert would_change(recipe, Backbone.of(tiny_model()))["experts"] == 5
    with pytest.raises(UserError, match=r"repair\.max_length: found null"):
        rasa_planned(recipe).stages()
