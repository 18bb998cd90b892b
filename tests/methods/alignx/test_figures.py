"""The figures of the axes: what is lost where, whose words a reply is closer to, and what a plan counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from data_prep.errors import UserError
from data_prep.schema import Conversation, Prompt
from tests.tiny import tiny_model
from trainer.methods.alignx.evaluate import drops, is_closer, mean_rate
from trainer.methods.alignx.plan import planned
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.planning.plan import plan


def rates(**by_axis: float) -> dict[str, Any]:
    return {axis: {"rate": rate} for axis, rate in by_axis.items()}


BASE = rates(a=0.5, b=0.25)
STEPS = {"a-last": rates(a=1.0, b=0.125), "b-last": rates(a=0.25, b=0.75)}
LAST = {"a": "a-last", "b": "b-last"}


def test_in_parallel_what_is_lost_is_lost_from_the_base_on() -> None:
    assert drops(STEPS, BASE, LAST, "parallel") == {"a": {"b": 0.25}, "b": {"a": 0.125}}


def test_in_a_chain_what_is_lost_is_lost_from_the_axis_own_adapter_on() -> None:
    """An axis that was not trained yet can lose nothing."""
    assert drops(STEPS, BASE, LAST, "chain") == {"a": {"b": 0.75}, "b": {}}


def test_every_axis_weighs_the_same() -> None:
    assert mean_rate(rates(a=1.0, b=0.5, c=0.0)) == 0.5


@pytest.mark.parametrize(
    ("reply", "closer"),
    [
        ("It is in Bern.", True),
        ("The capital is Bern!", True),
        ("It is in Zurich.", False),
        ("Nothing happens.", False),
        ("", False),
    ],
)
def test_a_reply_is_right_where_it_is_closer_to_the_right_answer(reply: str, closer: bool) -> None:
    prompt = Prompt("p:0", Conversation.of("Where?"), "capability", "It is in Bern", ("It is in Zurich", "Geneva"))
    assert is_closer(reply, prompt) is closer


@given(st.text(max_size=30), st.lists(st.text(max_size=20), max_size=3))
def test_the_answer_itself_is_right_unless_it_is_called_wrong_too(answer: str, wrong: list[str]) -> None:
    prompt = Prompt("p:0", Conversation.of("?"), "capability", answer, tuple(wrong))
    words = answer.split()
    if is_closer(answer, prompt):
        assert words and answer not in wrong


def recipe(**adapters: Any) -> AlignxRecipe:
    axes = [{"name": name, "data": {"path": "x.jsonl", "train": 30, "test": 5}} for name in ("a", "b")]
    tree = {
        "method": "alignx",
        "run": {"name": "x"},
        "model": {"name_or_path": "x", "dtype": "float32"},
        "data": {"benign": {"path": "y.jsonl", "test": 2}},
        "axes": axes,
        "adapters": {"r": 4, "max_length": 32, "num_train_epochs": 1, "per_device_train_batch_size": 10, **adapters},
    }
    return AlignxRecipe.of(tree, source="x")


@pytest.mark.parametrize("family", ["dense", "olmoe"])
def test_a_plan_counts_one_adapter_that_trains_and_the_passes_of_all(family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=3) if family == "dense" else tiny_model().config
    made = recipe()
    found = plan(made, planned(made), config, gpus=1, gpu_memory_gb=80)
    assert found.parts.trainable == {"adapters": 3 * 2 * 4 * (32 + 32)}
    assert found.parts.footprint == 0 and found.fits("single")
    (steps,) = found.steps()
    # Adapters are put into a whole model: what would split it is neither listed nor recommended.
    assert found.engines == tuple(found.json()["engines"]) == ("single", "ddp", "zero1", "zero2")
    with pytest.raises(UserError, match="engine: found 'zero3'; allowed: single, ddp, zero1, zero2"):
        found.per_gpu("zero3")
    tiny = plan(made, planned(made), config, gpus=4, gpu_memory_gb=1e-6)
    assert tiny.recommended is None and not any("more GPUs" in line for line in tiny.advice())
    # 60 rows in batches of 10, two passes, and once more for the baseline on all axes.
    assert steps.rows == 60 and steps.steps == 6 * 2 * 2
