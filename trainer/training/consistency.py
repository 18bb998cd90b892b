"""Routing consistency: train only the routers so that a jailbroken prompt routes like its refused plain twin.

`L = mean over layers and pairs of KL(stopgrad(p_anchor) || p_adversarial)` (RASA), p the softmax of the router's
logits in fp32, masked and per pair. A benign stream keeps harmless prompts routing as in the original model (MESA).

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
from trainer.moe.routing import Trace, record
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.recipe.sections import ConsistencySection
from trainer.training.loop import StageResult, arguments, configs_kept, stop_unless_finite, train
from trainer.training.resume import ResumableTrainer

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
) -> StageResult:
    """Run the stage; the routers of `trained` are changed in place, nothing else.

    `inputs` tells checkpoints in `folder` from those of another run.

    Raises:
        NonFiniteLossError: training diverged; the weights before the step are kept in `folder`.
    """
    config = TrainingArguments(**arguments(section, folder, seed, trained.model))
    trained.train_routers()
    with configs_kept(trained.model):
        trainer = RoutingConsistencyTrainer(trained, section, folder, chat, config, _dataset(chat, rows))
        return train(trainer, "consistency", inputs)


def _dataset(chat: Chat, rows: Sequence[ConsistencyRow]) -> Dataset:
    columns: dict[str, list[Any]] = {
        f"{k}_{v}": [] for k in ("anchor", "adversarial", "benign") for v in ("ids", "prompt")
    }
    for row in rows:
        turns = {
            "anchor": chat.encode(row.anchor_prompt, row.refusal),
            "adversarial": chat.encode(row.adversarial_prompt, row.refusal),
            "benign": chat.encode(row.benign_prompt, row.benign_reply),
        }
        for side, turn in turns.items():
            columns[f"{side}_ids"].append(turn.ids)
            columns[f"{side}_prompt"].append(turn.prompt)
    return Dataset.from_dict(columns)


class RoutingConsistencyTrainer(ResumableTrainer):
    """transformers' Trainer with the routing loss; the loss is read from the routers, not from the model's output."""

    _tag_names = ["routealign", "routing-consistency"]

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
            sides = {}
            for side in ("anchor", "adversarial", "benign"):
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
        sides = {name: _batch(side) for name, side in inputs.items()}
        anchor = self._route(model, sides["anchor"], original=self.section.target == "original", grad=False)
        adversarial = self._route(model, sides["adversarial"], original=False, grad=True)
        assert any(t.requires_grad for t in adversarial.logits_TE.values()), (
            "no recorded router logit carries a gradient"
        )
        losses = [
            self._pair_loss(anchor.logits_TE[i], adversarial.logits_TE[i], sides["anchor"], sides["adversarial"])
            for i in adversarial.logits_TE
        ]
        loss = torch.stack(losses).mean()
        if self.section.benign_weight > 0:
            loss = loss + self.section.benign_weight * self._benign_loss(model, sides["benign"])
        stop_unless_finite(loss.detach(), self.state.global_step, self.trained, self.folder, "consistency")
        return loss

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

    def _pair_loss(self, anchor_TE: Tensor, adversarial_TE: Tensor, anchor: Batch, adversarial: Batch) -> Tensor:
        """Mean over pairs of the divergence of one layer's routing at the compared positions."""
        target_BCE, mask_BC = self._compared(anchor_TE, anchor)
        current_BCE, mask_too_BC = self._compared(adversarial_TE, adversarial)
        assert torch.equal(mask_BC, mask_too_BC), "both sides of a pair end in the same refusal"
        divergence_BC = divergence(target_BCE, current_BCE, self.section.direction) * mask_BC
        return (divergence_BC.sum(1) / mask_BC.sum(1).clamp(min=1)).mean()

    def _compared(self, logits_TE: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, C, E] at the compared positions and which of them are real, [B, C]."""
        log_p_BSE = torch.log_softmax(logits_TE.float() / self.section.temperature, -1).view(
            *batch.input_ids_BS.shape, -1
        )
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

    def _benign_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """KL(p_original || p), a mean over each harmless turn's real tokens and then over turns."""
        original = self._route(model, batch, original=True, grad=False)
        current = self._route(model, batch, original=False, grad=True)
        mask_BS = batch.attention_mask_BS.bool()
        share_BS = mask_BS / mask_BS.sum(1, keepdim=True)
        per_layer = []
        for i, logits_TE in current.logits_TE.items():
            target, now = (torch.log_softmax(t.float(), -1) for t in (original.logits_TE[i], logits_TE))
            divergence_BS = divergence(target, now, "forward").view(mask_BS.shape)
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
