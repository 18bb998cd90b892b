"""The steps that a plan rehearses, as the stages take them, at the fullest moment of each.

Every function here gives a `planned.Step`. Which parameters get gradients was said when the model was held.

Shapes: B rows, S positions, R predicted ones, V vocabulary, E experts, T = B x S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe.backbone import Backbone
from trainer.moe.routing import record
from trainer.moe.trainable import TrainableModel
from trainer.planning.planned import Held, Step
from trainer.recipe.sections import ConsistencySection, RepairSection


def replies(rows: int, length: int) -> Step:
    """The longest forward pass of generation, with its cache."""

    def step(held: Held) -> None:
        with torch.no_grad():
            held.model(**_inputs(rows, length), use_cache=True, logits_to_keep=1)

    return step


def saliency(rows: int, length: int) -> Step:
    """`detection.saliency.refusal_loss` over all experts, held by `experts_with_gradients`."""

    def step(backbone: Backbone) -> Tensor:
        inputs = _inputs(rows, length)
        logits_BSV = backbone.model(**inputs, use_cache=False).logits
        targets_BR = inputs["input_ids"][:, 1:]
        loss: Tensor = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2).float(), targets_BR, reduction="none").mean()
        return loss

    return step


def experts_with_gradients(backbone: Backbone) -> Backbone:
    """`planned.Hold`: the stock model, of which every expert, routed or shared, gets gradients."""
    backbone.model.requires_grad_(False)
    for parameter in (*backbone.expert_parameters().values(), *backbone.shared_parameters().values()):
        parameter.requires_grad_(True)
    return backbone


def repair(section: RepairSection, rows: int, length: int, response: int, retained: int) -> Step:
    """`ExpertRepairTrainer.compute_loss` at a step that is logged, where the original runs on every row.

    Args:
        response: of the positions, so many are trained, which the head sees alone.
        retained: of the rows, so many are compared with the original model.
    """
    kept = response + 1

    def step(held: TrainableModel) -> Tensor:
        held.model.train()
        inputs = _inputs(rows, length)
        replay = section.routing == "replay"
        original_BSV = _original_logits(held, inputs, kept) if replay else None
        with record(held.backbone):
            logits_BSV = held.model(**inputs, use_cache=False, logits_to_keep=kept).logits
        logits_BRV, targets_BR = logits_BSV[:, :-1], inputs["input_ids"][:, -response:]
        if not replay:
            _original_logits(held, inputs, 1)
        loss_BR = F.cross_entropy(logits_BRV.transpose(1, 2).float(), targets_BR, reduction="none")
        if retained:
            chosen_B = torch.arange(retained)
            current_BRV = logits_BRV[chosen_B]
            if replay:
                assert original_BSV is not None
                reference_BSV = original_BSV[chosen_B]
            else:
                reference_BSV = _original_logits(held, _inputs(retained, length), kept)
            reference_BRV = torch.log_softmax(reference_BSV[:, :-1].float(), -1)
            kl_BR = (reference_BRV.exp() * (reference_BRV - torch.log_softmax(current_BRV.float(), -1))).sum(-1)
            loss_BR = loss_BR.index_copy(0, chosen_B, kl_BR)
        return loss_BR.sum(1).mean()

    return step


def consistency(section: ConsistencySection, rows: int, length: int) -> Step:
    """`RoutingConsistencyTrainer.compute_loss`: two passes with gradients, whose graphs live together."""

    def step(held: TrainableModel) -> Tensor:
        held.model.train()
        inputs = _inputs(rows, length)
        terms: list[Tensor] = []
        for compared_with_original in (section.target == "original", True):
            if compared_with_original:
                with held.original() as original, record(original) as target:
                    original.model(**inputs, use_cache=False, logits_to_keep=1)
            else:
                with torch.no_grad(), record(held.backbone) as target:
                    held.model(**inputs, use_cache=False, logits_to_keep=1)
            with record(held.backbone, grad=True) as trace:
                held.model(**inputs, use_cache=False, logits_to_keep=1)
            for i, logits_TE in trace.logits_TE.items():
                goal_TE, now_TE = (torch.log_softmax(t.float(), -1) for t in (target.logits_TE[i], logits_TE))
                terms.append((goal_TE.exp() * (goal_TE - now_TE)).sum(-1).mean())
            if section.benign_weight == 0:
                break
        return torch.stack(terms).mean()

    return step


def _inputs(rows: int, length: int) -> dict[str, Any]:
    ids_BS = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


def _original_logits(held: TrainableModel, inputs: dict[str, Any], kept: int) -> Tensor:
    with held.original() as original, record(original):
        logits: Tensor = original.model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return logits
