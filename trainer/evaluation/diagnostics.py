"""What moved besides the behaviour: routing drift, and how much of the safety rests on the router alone.

Shapes: B sequences, S positions, T = B x S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.schema import Conversation
from trainer.evaluation.drift import LayerDrift, drift_per_layer
from trainer.evaluation.suite import Suite
from trainer.model.chat import Batch, Chat, batches, pad
from trainer.model.reply import Reply
from trainer.moe.modes import evaluating
from trainer.moe.routing import log_routing, record
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.runtime.processes import dealt, from_all_ranks

TWINS_A_BATCH = 8


def router_restore_gap(trained: TrainableModel, chat: Chat, suite: Suite, after: dict[str, Any]) -> float:
    """Rise of attack success (seen and unseen families pooled) when the original routers are put back.

    A large gap means that the repair was a routing shortcut (RASA, section on what shows that it worked).
    """
    roles = ("seen", "unseen")
    with trained.original(experts=False):
        restored = suite.measure_asr(trained.model, chat, roles, label="original routers put back")
    return _pooled(restored, roles) - _pooled(after, roles)


def _pooled(metrics: dict[str, Any], roles: Sequence[str]) -> float:
    rates = [metrics[f"asr_{role}"] for role in roles]
    return sum(r["rate"] * r["n"] for r in rates) / sum(r["n"] for r in rates)


@dataclass(frozen=True)
class Twins:
    """The same refusal after a plain goal and after the goal inside a jailbreak."""

    anchor: Conversation
    adversarial: Conversation
    refusal: Reply


@torch.no_grad()
def routing_gap(trained: TrainableModel, chat: Chat, twins: Sequence[Twins]) -> dict[str, float]:
    """How jailbroken prompts stand to their refused twins in the model as it is, at the tokens of the refusal.

    `routing_gap`: KL(anchor's routing || adversarial's), in nats, as each family weighs its experts; `flip_rate`: of
    the anchor's choices those that the adversarial side does not make; both a mean over layers and tokens, then twins.
    `refusal_loss`: mean cross-entropy of the refusal inside the jailbreak, in nats a token.
    """
    every = [twins[start : start + TWINS_A_BATCH] for start in range(0, len(twins), TWINS_A_BATCH)]
    found: dict[int, list[tuple[float, float, float]]] = {}
    with evaluating(trained.model):
        for number, some in dealt(every, together=is_sharded(trained.model)):
            anchors = pad([chat.encode(t.anchor, t.refusal) for t in some], chat.padding)
            adversarials = pad([chat.encode(t.adversarial, t.refusal) for t in some], chat.padding)
            routes, losses = [], None
            for batch in (anchors.to(trained.model.device), adversarials.to(trained.model.device)):
                with record(trained.backbone) as trace:
                    losses = _response_losses(trained, batch)
                routes.append(trace.masked(batch.response_BS))
            assert losses is not None
            log_p = [log_routing(trained.backbone, route) for route in routes]
            kl_T = torch.stack([(log_p[0][i].exp() * (log_p[0][i] - log_p[1][i])).sum(-1) for i in log_p[0]]).mean(0)
            before, now = (route.index_TK for route in routes)
            kept_LT = [(before[i].unsqueeze(-1) == now[i].unsqueeze(-2)).any(-1).float().mean(-1) for i in before]
            flips_T = 1 - torch.stack(kept_LT).mean(0)
            lengths = adversarials.response_BS.sum(1).tolist()
            each = (t.double().split(lengths) for t in (kl_T, flips_T, losses))
            found[number] = [
                (a.mean().item(), b.mean().item(), c.mean().item()) for a, b, c in zip(*each, strict=True)
            ]
    rows = [row for made in from_all_ranks(found) for row in made]
    names = ("routing_gap", "flip_rate", "refusal_loss")
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}


def _response_losses(trained: TrainableModel, batch: Batch) -> Tensor:
    """Cross-entropy of every response token of the batch, row after row."""
    first = max(int(batch.response_BS.int().argmax(1).min()), 1)
    logits_BRV = trained.model(
        input_ids=batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS,
        use_cache=False,
        logits_to_keep=batch.input_ids_BS.shape[1] - first + 1,
    ).logits[:, :-1]
    mask_BR = batch.response_BS[:, first:]
    return F.cross_entropy(logits_BRV[mask_BR].float(), batch.input_ids_BS[:, first:][mask_BR], reduction="none")


@torch.no_grad()
def routing_drift(
    trained: TrainableModel, chat: Chat, texts: Sequence[tuple[Conversation, Reply]], batch_size: int
) -> list[LayerDrift]:
    """Drift of every layer between the original and the repaired model on the same (prompt, reply) texts."""
    turns = [chat.encode(prompt, answer) for prompt, answer in texts]
    trained.model.eval()
    found: dict[int, tuple[int, list[LayerDrift]]] = {}
    every = list(batches(turns, chat.padding, batch_size))
    for number, (_, batch) in dealt(every, together=is_sharded(trained.model)):
        batch = batch.to(trained.model.device)
        inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
        with record(trained.backbone) as now:
            trained.model(**inputs, use_cache=False, logits_to_keep=1)
        with trained.original() as original, record(original) as before:
            original.model(**inputs, use_cache=False, logits_to_keep=1)
        mask_T = batch.attention_mask_BS.reshape(-1)
        former, current = (log_routing(trained.backbone, trace) for trace in (before, now))
        drift = drift_per_layer(before.index_TK, now.index_TK, former, current, mask_T)
        found[number] = int(mask_T.sum()), drift
    measured = from_all_ranks(found)
    return [_mean([(tokens, drift[i]) for tokens, drift in measured]) for i in range(len(trained.backbone))]


def _mean(drifts: list[tuple[int, LayerDrift]]) -> LayerDrift:
    """Mean over batches of one layer's drift, weighted by (the first of each pair) tokens."""
    tokens = sum(count for count, _ in drifts)
    return LayerDrift(
        layer=drifts[0][1]["layer"],
        flip_rate=sum(count * drift["flip_rate"] for count, drift in drifts) / tokens,
        kl=sum(count * drift["kl"] for count, drift in drifts) / tokens,
    )
