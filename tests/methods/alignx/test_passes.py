"""Stage 1: what a pass trains and what it leaves alone, and that a killed one ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.schema import Conversation
from tests.distributed.launching import start
from tests.methods.alignx.test_mixture import AXES, built
from tests.tiny import tiny_chat
from tests.training.test_resume import Killed, killed_after
from trainer.methods.alignx.adapters import Adapter, AxisAdapters
from trainer.methods.alignx.passes import AxisRow, train_adapter
from trainer.methods.alignx.recipe import AdaptersSection
from trainer.moe.backbone import Backbone
from trainer.training.loop import StageResult

ROWS = [AxisRow(Conversation.of(f"w{i} w{i + 1}"), f"w{i + 20} w3", "helpful") for i in range(20)]
FAST = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}


def section(**keys: Any) -> AdaptersSection:
    return AdaptersSection(**{"r": 4, "alpha": 8.0, "dropout": 0.0, **FAST, **keys})


def fresh(family: str = "olmoe", dtype: torch.dtype = torch.float32, **keys: Any) -> AxisAdapters:
    backbone = Backbone.of(built(family).to(dtype), takes_dense=True).check()
    return AxisAdapters(backbone, AXES, section(**keys), seed=0)


def run(adapters: AxisAdapters, folder: Path, name: str = "helpful", **more: Any) -> StageResult:
    return train_adapter(Adapter(adapters, name), tiny_chat(), ROWS, adapters.section, folder, 0, "a", **more)


def everything(adapters: AxisAdapters) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapters.model.named_parameters()}


def moved(before: dict[str, Tensor], adapters: AxisAdapters) -> set[str]:
    return {name for name, p in adapters.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama"])
def test_a_pass_moves_its_own_adapter_and_nothing_else(family: str, tmp_path: Path) -> None:
    """The router among it; the adapter starts as the base and ends as something else."""
    adapters = fresh(family, dropout=0.1)
    before = everything(adapters)
    result = run(adapters, tmp_path)
    changed = moved(before, adapters)
    assert changed and all(".helpful." in name for name in changed)
    assert len(changed) == result.moved_tensors == result.trained_tensors
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())


def test_the_loss_is_that_of_responses_alone(tmp_path: Path) -> None:
    """The first logged loss is the mean cross-entropy of the response tokens, computed here from bare logits."""
    adapters, chat = fresh(per_device_train_batch_size=20, max_steps=1, warmup_steps=0), tiny_chat()
    losses = []
    for row in ROWS:
        opening = chat.opening(row.prompt)
        words = chat.tokenizer(row.answer, add_special_tokens=False)["input_ids"]
        response = [*words, chat.turn_end]
        ids = torch.tensor([[*opening, *response]])
        with torch.no_grad():
            logits_SV = adapters.model(input_ids=ids).logits[0]
        chosen = torch.tensor(response)
        losses.append(torch.nn.functional.cross_entropy(logits_SV[len(opening) - 1 : -1], chosen))
    result = run(adapters, tmp_path)
    assert result.log[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "keys", [{"gradient_checkpointing": True}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}]
)
def test_checkpointing_and_accumulation_change_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    plain, other = fresh(), fresh(**keys)
    run(plain, tmp_path / "plain")
    run(other, tmp_path / "other")
    expected, found = (Adapter(adapters, "helpful").state_dict() for adapters in (plain, other))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("died_at", [3, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_pass_killed_inside_ends_with_the_same_bits(
    died_at: int, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh(dropout=dropout)
    run(whole, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(died_at, patch)
        with pytest.raises(Killed):
            run(fresh(dropout=dropout), tmp_path / "killed")
    resumed = fresh(dropout=dropout)
    assert run(resumed, tmp_path / "killed").log, "it goes on"
    expected = Adapter(whole, "helpful").state_dict()
    found = Adapter(resumed, "helpful").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_dropout_drops_in_training_and_the_rest_of_the_model_draws_nothing(tmp_path: Path) -> None:
    with_dropout, without = fresh(dropout=0.5), fresh()
    run(with_dropout, tmp_path / "a")
    run(without, tmp_path / "b")
    states = [Adapter(adapters, "helpful").state_dict() for adapters in (with_dropout, without)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adapters_of_a_16_bit_model_are_trained_in_fp32(tmp_path: Path) -> None:
    adapters = fresh(dtype=torch.bfloat16)
    run(adapters, tmp_path)
    assert {p.dtype for p in adapters.parameters("helpful").values()} == {torch.float32}
    assert adapters.model.dtype == torch.bfloat16


def test_weights_of_other_targets_or_another_rank_are_refused() -> None:
    state = Adapter(fresh(targets=["q_proj", "o_proj"]), "honest").state_dict()
    with pytest.raises(ValueError, match="adapter 'honest': saved weights have other targets"):
        Adapter(fresh(), "honest").load_state_dict(state)
    with pytest.raises(ValueError, match="found shape"):
        Adapter(fresh(), "honest").load_state_dict(Adapter(fresh(r=2), "honest").state_dict())


def test_targets_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapters\.targets: the model has no linear layer named 'query'; found:"):
        fresh(targets=["q_proj", "query"])


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_train_the_weights_of_one(engine: str, tmp_path: Path) -> None:
    states = {}
    for name in ("single", engine):
        folder = tmp_path / name
        folder.mkdir()
        ended = start(name, folder, "tests.methods.alignx.worker", folder)
        assert ended.returncode == 0, ended.stderr[-3000:]
        states[name] = load_file(folder / "adapter.safetensors")
    for name, value in states["single"].items():
        difference = (states[engine][name].double() - value.double()).norm() / value.double().norm()
        assert float(difference) < 1e-5, name
