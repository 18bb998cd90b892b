"""The same model under trainers: TRL's, TRL's with PEFT, and ours, on the same rows. Half of the rows are harmless.

A row is a prompt and a response of half the length each. TRL trains all of them by cross-entropy on the response; ours
trains half of them so, and on the other half keeps the original's answers by cross-entropy (`ce`), by KL to the
original (`kl`), or by KL with the original's choice of experts pinned (`replay`).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler
from trl import SFTConfig, SFTTrainer

from benchmarks.setting import Setting
from benchmarks.ways import lora_config
from data_prep.schema import Conversation
from tests.tiny import tiny_chat
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.experts import SplitModel
from trainer.recipe.sections import RepairSection
from trainer.runtime.peak import now
from trainer.training.repair import Stream, TrainingRow, repair_experts

STEPS = 4
"""The first one also checks and allocates; it is not counted."""
Train = Callable[[PreTrainedModel, Setting], list[float]]
"""Trains a model, and returns the seconds of each step that counts."""


def trl(peft: bool) -> Train:
    """TRL's SFTTrainer on every weight, or with PEFT's LoRA on every expert."""

    def train(model: PreTrainedModel, setting: Setting) -> list[float]:
        half = setting.length // 2
        ids = [[2 + (row * 31 + at * 7) % 50 for at in range(setting.length)] for row in range(setting.rows * STEPS)]
        responses = [[0] * half + [1] * (setting.length - half) for _ in ids]
        rows = Dataset.from_dict({"input_ids": ids, "completion_mask": responses})
        adapter: LoraConfig | None = lora_config(setting) if peft else None
        with tempfile.TemporaryDirectory() as folder, _timed() as seconds:
            arguments: dict[str, Any] = {**_arguments(setting), "output_dir": folder, "completion_only_loss": True}
            # TRL's defaults recompute activations and mix types; ours do neither, so neither does it.
            arguments |= {"gradient_checkpointing": False, "bf16": False}
            config = SFTConfig(**arguments, router_aux_loss_coef=0.0, optim="adamw_torch_fused")
            chat = tiny_chat()
            SFTTrainer(
                model=model, args=config, train_dataset=rows, processing_class=chat.tokenizer, peft_config=adapter
            ).train()
        return seconds

    return train


def ours(**keys: Any) -> Train:
    """The repair stage, with keys of its section."""

    def train(model: PreTrainedModel, setting: Setting) -> list[float]:
        backbone = Backbone.of(model).check()
        trained = SplitModel(backbone, setting.critical(backbone))
        section = RepairSection(**_arguments(setting), max_length=setting.length, retain_weight=1.0, **keys)
        streams: list[Stream] = ["repair", "retain"]
        chat = tiny_chat()
        frame = len(chat.opening(Conversation.of("w1"))) - 1
        half = setting.length // 2
        rows = [
            TrainingRow(
                Conversation.of(" ".join(f"w{(row + at) % 50}" for at in range(half - frame))),
                Reply.written(" ".join(f"w{(3 * row + at) % 50}" for at in range(setting.length - half - 1))),
                streams[row % 2],
                streams[row % 2],
            )
            for row in range(setting.rows * STEPS)
        ]
        with tempfile.TemporaryDirectory() as folder, _timed() as seconds:
            repair_experts(trained, chat, rows, section, Path(folder), seed=0)
        return seconds

    return train


def _arguments(setting: Setting) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": setting.rows,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "logging_steps": STEPS,
    }


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Seconds of every step but the first, from its beginning to its end."""
    found: list[float] = []
    began, ended = CallbackHandler.on_step_begin, CallbackHandler.on_step_end
    start = 0.0

    def on_begin(self: Any, *given: Any) -> Any:
        nonlocal start
        control = began(self, *given)
        start = now(PartialState().device)
        return control

    def on_end(self: Any, *given: Any) -> Any:
        found.append(now(PartialState().device) - start)
        return ended(self, *given)

    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with (
        silent[0],
        silent[1],
        mock.patch.object(CallbackHandler, "on_step_begin", on_begin),
        mock.patch.object(CallbackHandler, "on_step_end", on_end),
    ):
        yield found
    del found[:1]


TRAINERS: dict[str, Train] = {
    "trainer_full": trl(peft=False),
    "trainer_peft": trl(peft=True),
    "trainer_split_ce": ours(retain_loss="ce"),
    "trainer_split_kl": ours(retain_loss="kl"),
    "trainer_split_replay": ours(retain_loss="kl", routing="replay"),
}
