"""Routing consistency: train only the routers so that a jailbroken prompt routes like its refused plain twin.

`L = mean over layers and pairs of KL(stopgrad(p_anchor) || p_adversarial)` (RASA), p how the router's own family
weighs all experts (`Scoring.log_distribution`: a softmax, or normalised sigmoids), in fp32, masked and per pair. A
benign stream keeps harmless prompts routing as in the original model (MESA).

Shapes: B pairs, S positions, E experts, T = B x S tokens, C compared positions per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from data_prep.schema import Conversation
from trainer.model.chat import Batch, Chat, ChatTurn, pad
from trainer.model.reply import Reply
from trainer.moe.backbone import MoELayer
from trainer.moe.modes import draw_nothing, evaluating
from trainer.moe.routing import Trace, log_routing, record
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.recipe.sections import ConsistencySection
from trainer.training.first_step import check_is_original, check_loss, check_nothing_is_drawn, routing_row
from trainer.training.fitting import CUT_TARGET, RowTable, turn_of
from trainer.training.loop import StageResult, arguments, configs_kept, stop_unless_finite, train
from trainer.training.resume import ResumableTrainer

SIDES = ("anchor", "adversarial", "benign")
LAST_PROMPT, RESPONSE_MEAN, RESPONSE_TOKENS = "last_prompt", "response_mean", "response_tokens"


@dataclass(frozen=True)
class ConsistencyRow:
    """The same refusal after the plain goal and after the jailbreak, and one harmless turn to hold in place."""

    anchor_prompt: Conversation
    adversarial_prompt: Conversation
    refusal: Reply
    benign_prompt: Conversation
    benign_reply: Reply


def make_routing_consistent(
    trained: TrainableModel,
    chat: Chat,
    rows: Sequence[ConsistencyRow],
    section: ConsistencySection,
    folder: Path,
    seed: int,
    inputs: str = "",
    max_length: int | None = None,
) -> StageResult:
    """Run the stage; the routers of `trained` are changed in place, nothing else.

    Args:
        inputs: tells checkpoints in `folder` from those of another run.
        max_length: tokens of the longest text; a pair with a longer one is dropped, a harmless turn is cut.

    Raises:
        UserError: no pair is short enough, or training moved nothing.
        RuntimeError: what the first batch is checked for (`first_step`) does not hold.
        NonFiniteLossError: training diverged; the weights before the step are kept in `folder`.
    """
    config = TrainingArguments(**arguments(section, folder, seed, trained.model))
    table = RowTable("consistency")
    dataset = _dataset(chat, rows, max_length, table)
    trained.train_routers()
    with configs_kept(trained.model):
        trainer = RoutingConsistencyTrainer(trained, section, folder, chat, config, dataset)
        return train(trainer, "consistency", inputs, dataset, table)


def _dataset(chat: Chat, rows: Sequence[ConsistencyRow], max_length: int | None, table: RowTable) -> Dataset:
    """The pairs that fit whole: both sides end in the same refusal, so neither may be cut."""
    columns: dict[str, list[Any]] = {"row": []} | {
        f"{side}_{what}": [] for side in SIDES for what in ("ids", "prompt")
    }
    for row in rows:
        turns = {
            "anchor": turn_of(chat, row.anchor_prompt, row.refusal),
            "adversarial": turn_of(chat, row.adversarial_prompt, row.refusal),
            "benign": turn_of(chat, row.benign_prompt, row.benign_reply),
        }
        over = {side for side, turn in turns.items() if max_length is not None and len(turn.ids) > max_length}
        if over - {"benign"}:
            table.drop("pair", CUT_TARGET)
            continue
        table.keep("pair", row.refusal, cut=bool(over))
        columns["row"].append(len(columns["row"]))
        for side, turn in turns.items():
            columns[f"{side}_ids"].append(turn.ids[:max_length])
            columns[f"{side}_prompt"].append(min(turn.prompt, len(columns[f"{side}_ids"][-1])))
    table.show()
    table.check()
    return Dataset.from_dict(columns)


class RoutingConsistencyTrainer(ResumableTrainer):
    """transformers' Trainer with the routing loss; the loss is read from the routers, not from the model's output."""

    _tag_names = ["routealign", "routing-consistency"]
    trained: TrainableModel

    def __init__(
        self,
        trained: TrainableModel,
        section: ConsistencySection,
        folder: Path,
        chat: Chat,
        config: TrainingArguments,
        dataset: Dataset,
    ):
        self.trained, self.section, self.folder = trained, section, folder
        padding = chat.padding

        def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            sides: dict[str, Any] = {"rows": torch.tensor([e["row"] for e in examples])}
            for side in SIDES:
                batch = pad([ChatTurn(e[f"{side}_ids"], e[f"{side}_prompt"]) for e in examples], padding)
                sides[side] = {
                    "input_ids": batch.input_ids_BS,
                    "attention_mask": batch.attention_mask_BS,
                    "prompt": batch.prompt_BS,
                    "response": batch.response_BS,
                }
            return sides

        super().__init__(
            model=trained.model,
            args=config,
            train_dataset=dataset,
            processing_class=chat.tokenizer,
            data_collator=collate,
        )
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert not return_outputs, "the stage has no evaluation loop"
        draw_nothing(self.trained.model)
        sides = {side: _batch(inputs[side]) for side in SIDES}
        anchor = self._route(model, sides["anchor"], original=self.section.target == "original", grad=False)
        adversarial = self._route(model, sides["adversarial"], original=False, grad=True)
        assert any(t.requires_grad for t in adversarial.logits_TE.values()), (
            "no recorded router logit carries a gradient"
        )
        loss = torch.stack(
            [
                self._pair_loss(layer, anchor, adversarial, sides["anchor"], sides["adversarial"])
                for layer in self.trained.backbone
            ]
        ).mean()
        kept = None
        if self.section.benign_weight > 0:
            kept = [
                self._route(model, sides["benign"], original=original, grad=not original) for original in (True, False)
            ]
            loss = loss + self.section.benign_weight * self._benign_loss(kept[0], kept[1], sides["benign"])
        stop_unless_finite(loss.detach(), self.state.global_step, self.trained, self.folder, "consistency")
        if self.is_first_batch():
            self._check_routing(model, anchor, adversarial, sides["adversarial"])
            expected = self._loss_by_row(inputs["rows"].tolist(), anchor, adversarial, kept)
            check_loss("consistency", loss.item(), expected, torch.float32)
        return loss

    # --- the first batch --------------------------------------------------------------------------

    def _check_routing(self, model: nn.Module, anchor: Trace, adversarial: Trace, batch: Batch) -> None:
        if any(t.requires_grad for t in anchor.logits_TE.values()):
            raise RuntimeError("consistency: the anchor's routing carries a gradient, so both sides would move")
        mask_BS = batch.attention_mask_BS
        with evaluating(self.trained.model):
            again = self._route(model, batch, original=False, grad=False)
        check_nothing_is_drawn("consistency", adversarial, again, mask_BS)
        if self.trained.is_original:
            original = self._route(model, batch, original=True, grad=False)
            check_is_original("consistency", adversarial, original, mask_BS, self.trained.dtype)

    def _loss_by_row(self, rows: list[int], anchor: Trace, adversarial: Trace, kept: list[Trace] | None) -> float:
        """The loss of these rows, from the recorded logits and each row's own length."""
        section, found = self.section, self.train_dataset.select(rows)
        losses = []
        for layer in self.trained.backbone:

            def routing(trace: Trace, number: int, at: slice, temperature: float) -> Tensor:
                logits_BSE = trace.logits_TE[layer.index].view(len(rows), -1, layer.num_experts)  # noqa: B023
                return layer.log_distribution(logits_BSE[number, at].detach(), temperature)  # noqa: B023

            for number, row in enumerate(found):
                sides = []
                for side, trace in (("anchor", anchor), ("adversarial", adversarial)):
                    prompt, length = row[f"{side}_prompt"], len(row[f"{side}_ids"])
                    at = slice(prompt - 1, prompt) if section.position == LAST_PROMPT else slice(prompt, length)
                    sides.append(routing(trace, number, at, section.temperature))
                losses.append(routing_row(sides[0], sides[1], section.position, section.direction))
                if kept is not None:
                    original, now = (routing(trace, number, slice(len(row["benign_ids"])), 1.0) for trace in kept)
                    losses[-1] += section.benign_weight * routing_row(original, now, RESPONSE_TOKENS, "forward")
        return sum(losses) / len(losses)

    # --- the loss ---------------------------------------------------------------------------------

    def _route(self, model: nn.Module, batch: Batch, *, original: bool, grad: bool) -> Trace:
        arguments_ = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
        if original:
            with self.trained.original() as backbone, record(backbone) as trace:
                gathers = backbone.model is self.trained.model and is_sharded(backbone.model)
                runs = model if gathers else backbone.model
                runs(**arguments_, use_cache=False, logits_to_keep=1)
        else:
            with torch.set_grad_enabled(grad), record(self.trained.backbone, grad=grad) as trace:
                logits_B1V = model(**arguments_, use_cache=False, logits_to_keep=1).logits
            if grad and is_sharded(self.trained.model):
                # Sharding engines gather a layer for the backward pass when a gradient arrives at its output, which
                # the routing of the last layer is not part of.
                last = max(trace.logits_TE)
                trace.logits_TE[last] = trace.logits_TE[last] + 0.0 * logits_B1V.sum()
        return trace

    def _pair_loss(
        self, layer: MoELayer, anchor: Trace, adversarial: Trace, anchors: Batch, adversarials: Batch
    ) -> Tensor:
        """Mean over pairs of the divergence of one layer's routing at the compared positions."""
        target_BCE, mask_BC = self._compared(layer, anchor, anchors)
        current_BCE, mask_too_BC = self._compared(layer, adversarial, adversarials)
        assert torch.equal(mask_BC, mask_too_BC), "both sides of a pair end in the same refusal"
        divergence_BC = divergence(target_BCE, current_BCE, self.section.direction) * mask_BC
        return (divergence_BC.sum(1) / mask_BC.sum(1).clamp(min=1)).mean()

    def _compared(self, layer: MoELayer, trace: Trace, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, C, E] at the compared positions and which of them are real, [B, C]."""
        log_p_TE = layer.log_distribution(trace.logits_TE[layer.index], self.section.temperature)
        log_p_BSE = log_p_TE.view(*batch.input_ids_BS.shape, -1)
        prompt_B, length_B = batch.prompt_BS.sum(1), batch.response_BS.sum(1)
        if self.section.position == LAST_PROMPT:
            rows = torch.arange(len(prompt_B), device=log_p_BSE.device)
            return log_p_BSE[rows, prompt_B - 1].unsqueeze(1), torch.ones_like(prompt_B, dtype=torch.bool).unsqueeze(1)
        # Gather each row's response to the front, so that both sides of a pair line up token by token.
        offsets_C = torch.arange(int(length_B.max()), device=log_p_BSE.device)
        mask_BC = offsets_C < length_B.unsqueeze(1)
        positions_BC = (prompt_B.unsqueeze(1) + offsets_C).clamp(max=log_p_BSE.shape[1] - 1)
        log_p_BCE = log_p_BSE.gather(1, positions_BC.unsqueeze(-1).expand(-1, -1, log_p_BSE.shape[-1]))
        if self.section.position == RESPONSE_TOKENS:
            return log_p_BCE, mask_BC
        mean_BE = (log_p_BCE.exp() * mask_BC.unsqueeze(-1)).sum(1) / mask_BC.sum(1, keepdim=True).clamp(min=1)
        return mean_BE.clamp(min=1e-20).log().unsqueeze(1), torch.ones_like(mask_BC[:, :1])

    def _benign_loss(self, original: Trace, current: Trace, batch: Batch) -> Tensor:
        """KL(p_original || p), a mean over each harmless turn's real tokens and then over turns."""
        mask_BS = batch.attention_mask_BS.bool()
        share_BS = mask_BS / mask_BS.sum(1, keepdim=True)
        targets, routed = (log_routing(self.trained.backbone, trace) for trace in (original, current))
        per_layer = []
        for i, now in routed.items():
            divergence_BS = divergence(targets[i], now, "forward").view(mask_BS.shape)
            per_layer.append((divergence_BS.masked_fill(~mask_BS, 0.0) * share_BS).sum(1).mean())
        return torch.stack(per_layer).mean()


def divergence(target: Tensor, current: Tensor, direction: Literal["forward", "reverse", "symmetric"]) -> Tensor:
    """KL between distributions given as log-probabilities over the last dimension; the target carries no gradient.

    forward: KL(target || current); reverse: KL(current || target); symmetric: their mean.
    """
    target = target.detach()
    forward = (target.exp() * (target - current)).sum(-1)
    if direction == "forward":
        return forward
    reverse = (current.exp() * (current - target)).sum(-1)
    return reverse if direction == "reverse" else (forward + reverse) / 2


def _batch(side: dict[str, Tensor]) -> Batch:
    return Batch(side["input_ids"], side["attention_mask"], side["prompt"], side["response"])
