"""What moved besides the behaviour: routing drift, and how much of the safety rests on the router alone.

Shapes: B sequences, S positions, T = B x S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trainer.chat import batches, encode, pad_id
from trainer.evaluation.drift import LayerDrift, drift_per_layer
from trainer.evaluation.suite import Suite
from trainer.moe.routing import record
from trainer.moe.trained import Trained


def router_restore_gap(
    trained: Trained, tokenizer: PreTrainedTokenizerBase, suite: Suite, after: dict[str, Any]
) -> float:
    """Rise of attack success (seen and unseen families pooled) when the original routers are put back.

    A large gap means that the repair was a routing shortcut (RASA, section on what shows that it worked).
    """
    roles = ("seen", "unseen")
    with trained.original(experts=False):
        restored = suite.measure_asr(trained.model, tokenizer, roles, label="original routers put back")
    return _pooled(restored, roles) - _pooled(after, roles)


def _pooled(metrics: dict[str, Any], roles: Sequence[str]) -> float:
    rates = [metrics[f"asr_{role}"] for role in roles]
    return sum(r["rate"] * r["n"] for r in rates) / sum(r["n"] for r in rates)


@torch.no_grad()
def routing_drift(
    trained: Trained, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], batch_size: int
) -> list[LayerDrift]:
    """Drift of every layer between the original and the repaired model on the same (prompt, reply) texts."""
    turns = [encode(tokenizer, prompt, answer) for prompt, answer in texts]
    sums: dict[int, LayerDrift] = {}
    tokens = 0
    trained.model.eval()
    for _, batch in batches(turns, pad_id(tokenizer), batch_size):
        batch = batch.to(trained.model.device)
        inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
        with record(trained.backbone) as now:
            trained.model(**inputs, use_cache=False, logits_to_keep=1)
        with trained.original() as original, record(original) as before:
            original.model(**inputs, use_cache=False, logits_to_keep=1)
        mask_T = batch.attention_mask_BS.reshape(-1)
        count = int(mask_T.sum())
        tokens += count
        for drift in drift_per_layer(before.index_TK, now.index_TK, before.logits_TE, now.logits_TE, mask_T):
            total = sums.setdefault(drift["layer"], LayerDrift(layer=drift["layer"], flip_rate=0.0, kl=0.0))
            total["flip_rate"] += drift["flip_rate"] * count
            total["kl"] += drift["kl"] * count
    return [
        LayerDrift(layer=layer, flip_rate=total["flip_rate"] / tokens, kl=total["kl"] / tokens)
        for layer, total in sorted(sums.items())
    ]
