"""bitsandbytes' 8-bit and paged optimisers in a stage, and their states in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.schema import Conversation
from tests.tiny import tiny_chat, tiny_model
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.recipe.sections import RepairSection
from trainer.training.repair import ExpertRepairTrainer, TrainingRow, repair_experts

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

ROWS = [
    TrainingRow(Conversation.of(f"w{i} w{i + 1} w{i + 2}"), Reply.written(f"w{i + 3} w5"), "repair", "jailbreak")
    for i in range(16)
]
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
}


def split() -> SplitModel:
    backbone = Backbone.of(tiny_model()).check()
    # Every expert of a layer: [8, 32, 32] weights are many enough for bitsandbytes to hold their states in 8 bits.
    members = tuple(Member(0, expert) for expert in range(8))
    return SplitModel(backbone, ExpertSet(members, {layer.index: layer.num_experts for layer in backbone}))


def repair(model: SplitModel, folder: Path, optim: str) -> dict[str, torch.Tensor]:
    section = RepairSection(**SETTINGS, optim=optim)
    repair_experts(model, tiny_chat(), ROWS, section, folder, 0, "same")
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_killed_stage_goes_on_with_its_8_bit_states(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = repair(split(), tmp_path / "whole", optim)
    step, used = ExpertRepairTrainer.training_step, set[torch.dtype]()

    def killed(self: ExpertRepairTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            used.update(t.dtype for s in self.optimizer.state.values() for t in s.values() if hasattr(t, "dtype"))
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ExpertRepairTrainer, "training_step", killed)
        repair(split(), tmp_path / "killed", optim)
    assert torch.uint8 in used, "states were not held in 8 bits"
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    resumed = repair(split(), tmp_path / "killed", optim)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    start = split().state_dict()
    assert any(not torch.equal(start[name], expected[name]) for name in split().trainable())
