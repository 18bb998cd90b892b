"""Batches of rows whose responses are trained: their tensors, the logits that predict responses, and means by row.

Shapes: B rows, S positions, R positions from the first response token of the batch on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.chat import ChatTurn, pad


def response_batch(examples: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `response` [B, S], and the `row` numbers [B], of a data set's examples."""
    batch = pad([ChatTurn(e["input_ids"], e["prompt_length"]) for e in examples], padding)
    return {
        "input_ids": batch.input_ids_BS,
        "attention_mask": batch.attention_mask_BS,
        "response": batch.response_BS,
        "row": torch.tensor([e["row"] for e in examples]),
    }


def response_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, R, V] that predict the positions from the batch's first response token on, those tokens, the span."""
    ids_BS, response_BS = inputs["input_ids"], inputs["response"]
    first = max(int(response_BS.int().argmax(1).min()), 1)
    kept = ids_BS.shape[1] - first + 1
    logits = model(
        input_ids=ids_BS, attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=kept
    ).logits
    return logits[:, :-1], ids_BS[:, first:], response_BS[:, first:]


def mean_by_row(loss_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """[B]: the mean over each row's response tokens."""
    return (loss_BR * mask_BR).sum(1) / mask_BR.sum(1).clamp(min=1)
