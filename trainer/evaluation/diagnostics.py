"""What moved besides the behaviour: routing drift, and how much of the safety rests on the router alone.

Shapes: B sequences, S positions, T = B x S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data_prep.schema import Conversation
from trainer.evaluation.drift import LayerDrift, drift_per_layer
from trainer.evaluation.suite import Suite
from trainer.model.chat import Chat, batches
from trainer.model.reply import Reply
from trainer.moe.routing import record
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.runtime.processes import dealt, from_all_ranks


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
        drift = drift_per_layer(before.index_TK, now.index_TK, before.logits_TE, now.logits_TE, mask_T)
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
