"""Checkpoints in the middle of a stage: whole or not there, and training goes on as if nothing had happened."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.schema import Conversation
from tests.moe.test_experts import split as split_family
from tests.tiny import tiny_chat
from trainer.model.reply import Reply
from trainer.moe.experts import SplitModel
from trainer.recipe.sections import ConsistencySection, RepairSection
from trainer.runtime import signals
from trainer.training import loop as watch
from trainer.training import resume as checkpoint
from trainer.training.consistency import ConsistencyRow, make_routing_consistent
from trainer.training.repair import TrainingRow, repair_experts

ROWS = [
    TrainingRow(
        Conversation.of(f"w{i} w{i + 1}"), Reply.written(f"w{i + 20} w3"), "retain" if i % 2 else "repair", "x"
    )
    for i in range(20)
]
REFUSAL, ANSWER = Reply.written("w50 w51"), Reply.written("w30 w31")
PAIRS = [
    ConsistencyRow(
        Conversation.of(f"w{i}"), Conversation.of(f"w40 w{i} w42"), REFUSAL, Conversation.of(f"w{i + 20} w3"), ANSWER
    )
    for i in range(20)
]
FAST = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}


def split(lora_rank: int | None = None) -> SplitModel:
    torch.manual_seed(0)  # LoRA starts from drawn weights
    return split_family("olmoe", lora_rank)


class Killed(Exception):
    """Stands for a SIGKILL: nothing of the stage runs after it."""


def run(trained: SplitModel, folder: Path, stage: str, inputs: str = "a", **keys: Any) -> list[dict[str, float]]:
    if stage == "consistency":
        section = ConsistencySection(**FAST)
        return make_routing_consistent(trained, tiny_chat(), PAIRS, section, folder, 0, inputs).log
    return repair_experts(trained, tiny_chat(), ROWS, RepairSection(**FAST, **keys), folder, 0, inputs).log


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next stage die at the end of step `steps`, before that step could be saved."""
    done = watch.SaveAndStop.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == steps:
            raise Killed
        done(self, args, state, control, **more)

    monkeypatch.setattr(watch.SaveAndStop, "on_step_end", on_step_end)


KINDS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "full": ("repair", {}, None),
    "lora": ("repair", {}, 4),
    "gates under replay": ("repair", {"train_gates": True, "routing": "replay"}, None),
    "consistency": ("consistency", {}, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("died_at", [3, 6])
def test_a_resumed_stage_ends_with_the_same_bits(
    kind: str, died_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, options, rank = KINDS[kind]
    whole = split(lora_rank=rank)
    log = run(whole, tmp_path / "whole", stage, **options)
    with monkeypatch.context() as patch:
        killed_after(died_at, patch)
        with pytest.raises(Killed):
            run(split(lora_rank=rank), tmp_path / "killed", stage, **options)
    torch.manual_seed(123)  # the process that goes on has drawn other numbers
    resumed = split(lora_rank=rank)
    later = run(resumed, tmp_path / "killed", stage, **options)
    assert same(resumed.state_dict(), whole.state_dict())
    losses, expected = ([e["loss"] for e in entries if "loss" in e] for entries in (later, log))
    assert losses == expected


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_checkpoint_of_other_inputs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run(split(), tmp_path, "repair", inputs="a")
    assert checkpoint.resumable(tmp_path, "a") == tmp_path / "checkpoint-2"
    assert checkpoint.resumable(tmp_path, "b") is None
    assert checkpoint.latest(tmp_path) is None


def test_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run(split(), tmp_path, "repair")
    about = tmp_path / "checkpoint-2" / checkpoint.ABOUT
    about.write_text(json.dumps(json.loads(about.read_text()) | {"processes": 8}))
    with pytest.raises(ValueError, match="interrupted under 8 processes, found 1; go on with 8, or remove"):
        run(split(), tmp_path, "repair")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"{}", b"\xff"])
@pytest.mark.parametrize(
    "name", [checkpoint.ABOUT, checkpoint.WEIGHTS, "trainer_state.json", "optimizer-0-of-1.safetensors"]
)
def test_a_damaged_file_of_a_checkpoint_is_refused_by_name_and_stays(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run(split(), tmp_path, "repair")
    (tmp_path / "checkpoint-2" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*remove .*checkpoint-2 to train this stage from its start"):
        run(split(), tmp_path, "repair")
    assert (tmp_path / "checkpoint-2" / name).read_bytes() == content


def test_states_in_the_parts_of_another_engine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-2, ZeRO-3 and FSDP2 name their files alike and cut the states differently."""
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            run(split(), tmp_path, "repair")
    about = tmp_path / "checkpoint-2" / checkpoint.ABOUT
    about.write_text(json.dumps(json.loads(about.read_text()) | {"kept_by": "zero2"}))
    with pytest.raises(ValueError, match="those of zero2, found single or ddp; go on with zero2, or remove"):
        run(split(), tmp_path, "repair")


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = checkpoint.save_tensors, 0

    def full_from_the_third_file_on(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", full_from_the_third_file_on)
    with pytest.raises(OSError, match="No space left on device"):
        run(split(), tmp_path, "repair")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_half_written_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / ".checkpoint-6.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_sigterm_finishes_the_step_and_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", False)
    done = watch.SaveAndStop.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            signals._on_signal(15, None)
        done(self, args, state, control, **more)

    monkeypatch.setattr(watch.SaveAndStop, "on_step_end", on_step_end)
    with pytest.raises(signals.Terminated) as ended:
        run(split(), tmp_path, "repair")
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_outside_of_training_sigterm_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", False)
    with pytest.raises(signals.Terminated):
        signals._on_signal(15, None)
