"""Expert repair: train only the critical experts to refuse inside jailbreaks what the model refuses plainly.

Two kinds of rows share a batch. `repair` rows carry the target refusal: cross-entropy on the response only. `retain`
rows carry the original model's own answer: KL to the original model (which the split holds for free) or cross-entropy.
Each row weighs the same whatever its length, so that the loss does not depend on how rows fall on ranks.

Shapes: B rows, S positions, R = S - 1 predicted positions, N of them response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from data_prep.schema import Conversation
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.moe.modes import draw_nothing, evaluating
from trainer.moe.routing import Trace, flip_rate, pin, record
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.recipe.sections import RepairSection
from trainer.training.first_step import check_is_original, check_loss, check_nothing_is_drawn, repair_row
from trainer.training.fitting import CUT_TARGET, NO_ROOM, LeftOut, RowTable, turn_of
from trainer.training.loop import StageResult, arguments, configs_kept, stop_unless_finite, train
from trainer.training.responses import Responses, response_batch, response_logits
from trainer.training.resume import ResumableTrainer

Stream = Literal["repair", "retain"]


@dataclass(frozen=True)
class TrainingRow:
    """One row of the stage. `source` says where it comes from (wrapped harmful, plain benign, ...), for the log."""

    prompt: Conversation
    reply: Reply
    stream: Stream
    source: str


def repair_experts(
    trained: TrainableModel,
    chat: Chat,
    rows: Sequence[TrainingRow],
    section: RepairSection,
    folder: Path,
    seed: int,
    inputs: str = "",
    left_out: LeftOut | None = None,
) -> StageResult:
    """Run the stage; `trained` is changed in place. `inputs` tells checkpoints in `folder` from those of another run.

    Args:
        left_out: rows that were left out before, to be counted with those that `max_length` leaves out.

    Raises:
        UserError: a source of rows is gone altogether, or training moved nothing.
        RuntimeError: what the first batch is checked for (`first_step`) does not hold.
        NonFiniteLossError: training diverged; the weights before the step are kept in `folder`.
    """
    config = SFTConfig(
        **arguments(section, folder, seed, trained.model),
        # The load-balancing loss is on by default in MoE configs and would move routing behind our back.
        router_aux_loss_coef=0.0,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    table = RowTable("repair", left_out)
    dataset = _dataset(chat, rows, config.max_length, table)
    trained.train_experts(routers=section.train_gates)
    with configs_kept(trained.model):
        trainer = ExpertRepairTrainer(trained, section, folder, chat, config, dataset)
        try:
            return train(trainer, "repair", inputs, dataset, table)
        finally:
            trainer.restore_forward()


def _dataset(chat: Chat, rows: Sequence[TrainingRow], max_length: int | None, table: RowTable) -> Dataset:
    """The rows that fit. A cut refusal is no refusal, so it is dropped; a cut answer is trained without its end."""
    columns: dict[str, list[Any]] = {"row": [], "input_ids": [], "prompt_length": [], "retain": []}
    for row in rows:
        turn = turn_of(chat, row.prompt, row.reply)
        cut = max_length is not None and len(turn.ids) > max_length
        if max_length is not None and turn.prompt >= max_length:
            table.drop(row.source, NO_ROOM)
        elif cut and row.stream == "repair":
            table.drop(row.source, CUT_TARGET)
        else:
            table.keep(row.source, row.reply, cut=cut)
            columns["row"].append(len(columns["row"]))
            columns["input_ids"].append(turn.ids[:max_length])
            columns["prompt_length"].append(turn.prompt)
            columns["retain"].append(row.stream == "retain")
    table.show()
    table.check()
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class Reference:
    """What the original model does on a batch. `logits`: [N, V], or [B, kept, V]."""

    routing: Trace
    logits: Tensor


class ExpertRepairTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFTTrainer with the two-stream loss and, for `replay`, the original routing pinned through the step."""

    _tag_names = ["trl", "sft", "routealign", "expert-repair"]
    trained: TrainableModel

    def __init__(
        self,
        trained: TrainableModel,
        section: RepairSection,
        folder: Path,
        chat: Chat,
        config: SFTConfig,
        dataset: Dataset,
    ):
        self.trained, self.section, self.folder = trained, section, folder
        self._replayed: Reference | None = None
        self._expected: float | None = None
        self._own_forward = trained.model.__dict__.get("forward")
        padding = chat.padding

        def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
            return response_batch(examples, padding) | {"retain": torch.tensor([e["retain"] for e in examples])}

        super().__init__(
            model=trained.model,
            args=config,
            train_dataset=dataset,
            processing_class=chat.tokenizer,
            data_collator=collate,
        )
        # Rows are averaged, not tokens, so the loss is scaled for gradient accumulation by the Trainer itself.
        self.model_accepts_loss_kwargs = False

    def restore_forward(self) -> None:
        """Take off the fused LM head that SFTTrainer patches onto the model and never removes."""
        if self._own_forward is None:
            self.trained.model.__dict__.pop("forward", None)
        else:
            self.trained.model.forward = self._own_forward

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        if self.is_first_batch():
            self._expected = self._loss_by_row(model, inputs["row"].tolist())
        if self.section.routing == "frozen":
            return super().training_step(model, inputs, num_items_in_batch)
        self._replayed = self._on_responses(model, inputs, torch.ones_like(inputs["retain"]))
        # Pinned through backward as well: checkpointing recomputes the forward there.
        with pin(self.trained.backbone, self._replayed.routing.index_TK):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert not return_outputs, "the stage has no evaluation loop"
        draw_nothing(self.trained.model)
        with record(self.trained.backbone) as routing:
            said = response_logits(model, self.trained.model, inputs)
        if self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
            original = self._replayed or self._reference(model, inputs)
            self._log_flips(routing, original.routing, inputs["attention_mask"])
            if self._expected is not None:
                self._check_routing(model, inputs, routing, original.routing)
        loss_B, loss = self._losses(model, inputs, said)
        for name, chosen in (("repair_loss", ~inputs["retain"]), ("retain_loss", inputs["retain"])):
            if chosen.any():
                self._metrics["train"][name].append(loss_B[chosen].mean().item())
        assert loss.requires_grad, "nothing in the model trains"
        stop_unless_finite(loss.detach(), self.state.global_step, self.trained, self.folder, "repair")
        if self._expected is not None:
            check_loss("repair", loss.item(), self._expected, self.trained.dtype)
            self._expected = None
        return loss

    # --- the first batch --------------------------------------------------------------------------

    def _check_routing(self, model: nn.Module, inputs: dict[str, Any], routing: Trace, original: Trace) -> None:
        mask_BS = inputs["attention_mask"]
        with torch.no_grad(), evaluating(self.trained.model), record(self.trained.backbone) as again:
            model(input_ids=inputs["input_ids"], attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
        check_nothing_is_drawn("repair", routing, again, mask_BS)
        if self.trained.is_original:
            check_is_original("repair", routing, original, mask_BS, self.trained.dtype)

    @torch.no_grad()
    def _loss_by_row(self, model: nn.Module, rows: list[int]) -> float:
        """The loss of these rows, each alone through the model and unpadded."""
        section, losses = self.section, []
        runs = model if is_sharded(self.trained.model) else self.trained.model
        for row in self.train_dataset.select(rows):
            ids, prompt = row["input_ids"], row["prompt_length"]
            kept, response = len(ids) - prompt + 1, ids[prompt:]
            inputs = {"input_ids": torch.tensor([ids], device=self.args.device)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            original = self._reference(model, inputs, kept)
            replayed = pin(self.trained.backbone, original.routing.index_TK)
            with evaluating(self.trained.model), replayed if section.routing == "replay" else nullcontext():
                logits_RV = runs(**inputs, use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
            original_RV = original.logits[0, -kept:-1]
            if self.trained.is_original:
                check_loss(
                    "repair, before the first update, against the original model",
                    repair_row(logits_RV, response, None, 0.0),
                    repair_row(original_RV, response, None, 0.0),
                    self.trained.dtype,
                )
            by_kl = row["retain"] and section.retain_loss == "kl" and section.retain_weight > 0
            loss = repair_row(logits_RV, response, original_RV if by_kl else None, section.first_token_weight)
            losses.append((section.retain_weight if row["retain"] else 1.0) * loss)
        return sum(losses) / len(losses)

    # --- the loss ---------------------------------------------------------------------------------

    def _losses(self, model: nn.Module, inputs: dict[str, Any], said: Responses) -> tuple[Tensor, Tensor]:
        """Unweighted loss per row [B], detached, and the weighted loss."""
        retain_B = inputs["retain"]
        loss_N = F.cross_entropy(said.logits_NV.float(), said.targets_N, reduction="none")
        use_kl = self.section.retain_loss == "kl" and self.section.retain_weight > 0
        if use_kl and retain_B.any():
            kept_N = retain_B[said.row_N]
            loss_N = loss_N.index_copy(
                0, kept_N.nonzero()[:, 0], self._kl(model, inputs, said.logits_NV[kept_N], kept_N)
            )
        elif use_kl and self._replayed is None and is_sharded(self.trained.model):
            # Other processes have rows to retain, and a sharded original needs this one to run.
            self._reference(model, inputs)
        loss_B, loss_BR = said.mean_by_row(loss_N), said.placed(loss_N)
        decision_B = loss_BR.gather(1, said.mask_BR.int().argmax(1, keepdim=True))[:, 0]
        weight_B = torch.where(retain_B, self.section.retain_weight, 1.0)
        return loss_B.detach(), (weight_B * (loss_B + self.section.first_token_weight * decision_B)).mean()

    def _kl(self, model: nn.Module, inputs: dict[str, Any], logits_NV: Tensor, kept_N: Tensor) -> Tensor:
        """KL(original || current) of the retain rows' tokens, in fp32; `kept_N` marks them among the batch's."""
        if self._replayed is not None:
            original_NV = self._replayed.logits[kept_N]
        else:
            original_NV = self._on_responses(model, inputs, inputs["retain"]).logits
        reference = torch.log_softmax(original_NV.float(), -1)
        return (reference.exp() * (reference - torch.log_softmax(logits_NV.float(), -1))).sum(-1)

    def _on_responses(self, model: nn.Module, inputs: dict[str, Any], rows_B: Tensor) -> Reference:
        """One forward of the original model on some rows: routing, and logits of their responses."""
        chosen = {name: inputs[name][rows_B] for name in ("input_ids", "attention_mask", "response")}
        with self.trained.original() as original, record(original) as routing:
            said = response_logits(self._runs(model, original.model), original.model, chosen)
        return Reference(routing, said.logits_NV)

    def _reference(self, model: nn.Module, inputs: dict[str, Any], kept: int = 1) -> Reference:
        """The same on every row, with logits on the last `kept` positions."""
        with self.trained.original() as original, record(original) as routing:
            logits_BSV = self._runs(model, original.model)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=kept,
            ).logits
        return Reference(routing, logits_BSV)

    def _runs(self, wrapped: nn.Module, original: nn.Module) -> nn.Module:
        """The engine's wrapper where only that can gather the original's weights, else the original itself.

        DDP's wrapper would wait for the other processes, which may have no row to retain.
        """
        return wrapped if original is self.trained.model and is_sharded(original) else original

    def _log_flips(self, now: Trace, original: Trace, attention_mask_BS: Tensor) -> None:
        mask_T = attention_mask_BS.bool()
        now, original = now.masked(mask_T), original.masked(mask_T)
        rates = [flip_rate(original.index_TK[i], now.index_TK[i]) for i in now.index_TK]
        self._metrics["train"]["topk_flip_rate"].append(sum(rates) / len(rates))
