"""Stage 1: passes over an axis' rows on one adapter, plain prompts first, then the same with its prefix injected.

`L = mean over rows of the mean over response tokens of CE`: the response alone, and every row weighs the same, so that
the loss does not depend on how rows fall on processes.

Shapes: B rows, S positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import SFTConfig

from data_prep.schema import Conversation
from trainer.methods.alignx.adapters import Adapter
from trainer.methods.alignx.recipe import AdaptersSection
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.moe.modes import draw_nothing, evaluating
from trainer.training.first_step import check_loss, repair_row
from trainer.training.fitting import NO_ROOM, RowTable, turn_of
from trainer.training.loop import StageResult, arguments, configs_kept, stop_unless_finite, train
from trainer.training.responses import response_batch, response_logits
from trainer.training.resume import ResumableTrainer

SECTION = "adapters"


@dataclass(frozen=True)
class AxisRow:
    """A prompt, the answer that is right on its axis, and the axis."""

    prompt: Conversation
    answer: str
    axis: str


def train_adapter(
    adapter: Adapter,
    chat: Chat,
    rows: Sequence[AxisRow],
    section: AdaptersSection,
    folder: Path,
    seed: int,
    inputs: str = "",
    steps_times: int = 1,
) -> StageResult:
    """One pass; the adapter's weights are changed in place, nothing else.

    Args:
        inputs: tells checkpoints in `folder` from those of another run.
        steps_times: so many times `adapters.max_steps`, where that is set.

    Raises:
        UserError: no row fits, or training moved nothing.
        RuntimeError: the loss of the first batch is not what it is documented to be.
        NonFiniteLossError: training diverged; the weights before the step are kept in `folder`.
    """
    config = SFTConfig(**arguments(section, folder, seed, adapter.model))
    if config.max_steps > 0:
        config.max_steps *= steps_times
    table = RowTable(SECTION, section=SECTION)
    dataset = _dataset(chat, rows, config.max_length, table)
    with configs_kept(adapter.model), adapter.training():
        trainer = AdapterTrainer(adapter, folder, chat, config, dataset)
        return train(trainer, SECTION, inputs, dataset, table)


def _dataset(chat: Chat, rows: Sequence[AxisRow], max_length: int | None, table: RowTable) -> Dataset:
    """The rows that fit; a cut answer is trained without its end."""
    columns: dict[str, list[Any]] = {"row": [], "input_ids": [], "prompt_length": []}
    for row in rows:
        reply = Reply.written(row.answer)
        turn = turn_of(chat, row.prompt, reply)
        if max_length is not None and turn.prompt >= max_length:
            table.drop(row.axis, NO_ROOM)
            continue
        table.keep(row.axis, reply, cut=max_length is not None and len(turn.ids) > max_length)
        columns["row"].append(len(columns["row"]))
        columns["input_ids"].append(turn.ids[:max_length])
        columns["prompt_length"].append(turn.prompt)
    table.show()
    table.check()
    return Dataset.from_dict(columns)


class AdapterTrainer(ResumableTrainer):
    """transformers' Trainer with the loss on responses, row by row; saves and restores the adapter alone."""

    _tag_names = ["routealign", "axis-adapter"]
    trained: Adapter

    def __init__(self, adapter: Adapter, folder: Path, chat: Chat, config: TrainingArguments, dataset: Dataset):
        self.trained, self.folder = adapter, folder
        padding = chat.padding

        def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return response_batch(examples, padding)

        super().__init__(
            model=adapter.model,
            args=config,
            train_dataset=dataset,
            processing_class=chat.tokenizer,
            data_collator=collate,
        )
        # Rows are averaged, not tokens, so the loss is scaled for gradient accumulation by the Trainer itself.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert not return_outputs, "a pass has no evaluation loop"
        draw_nothing(self.trained.model)
        if self.is_first_batch():
            with torch.no_grad():
                found = self._loss(self.trained.model, inputs).item()
            check_loss(SECTION, found, self._loss_by_row(inputs["row"].tolist()), self.trained.model.dtype)
        self.trained.drop()
        loss = self._loss(model, inputs)
        assert loss.requires_grad, "nothing in the model trains"
        stop_unless_finite(loss.detach(), self.state.global_step, self.trained, self.folder, SECTION)
        return loss

    @torch.no_grad()
    def _loss_by_row(self, rows: list[int]) -> float:
        """The loss of these rows, each alone through the model and unpadded."""
        losses = []
        for row in self.train_dataset.select(rows):
            ids, prompt = row["input_ids"], row["prompt_length"]
            ids_1S = torch.tensor([ids], device=self.args.device)
            with evaluating(self.trained.model):
                logits_1SV = self.trained.model(input_ids=ids_1S, use_cache=False).logits
            losses.append(repair_row(logits_1SV[0, prompt - 1 : -1], ids[prompt:], None, 0.0))
        return sum(losses) / len(losses)

    def _loss(self, runs: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean over rows of the mean cross-entropy of their response tokens."""
        said = response_logits(runs, self.trained.model, inputs)
        return said.mean_by_row(F.cross_entropy(said.logits_NV.float(), said.targets_N, reduction="none")).mean()
