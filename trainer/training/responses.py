"""Batches of rows whose responses are trained: their tensors, the logits that predict responses, and means by row.

The language model's head sees only the positions that predict a response token. At a vocabulary of 150,000 the logits
of one position take .6 MB in fp32, and a loss holds several copies of each; prompts and padding are most of a batch.

Shapes: B rows, S positions, R = S - 1 predicted positions, N of them response tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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


@dataclass(frozen=True)
class Responses:
    """The response tokens of a batch, row by row: `logits_NV` that predict them, and where they stand."""

    logits_NV: Tensor
    targets_N: Tensor
    mask_BR: Tensor

    @property
    def row_N(self) -> Tensor:
        """The row of each token."""
        return self.mask_BR.nonzero()[:, 0]

    def placed(self, values_N: Tensor) -> Tensor:
        """[B, R]: a value a token in its place, 0 elsewhere."""
        return values_N.new_zeros(self.mask_BR.shape).masked_scatter(self.mask_BR, values_N)

    def mean_by_row(self, values_N: Tensor) -> Tensor:
        """[B]: the mean over each row's response tokens."""
        return self.placed(values_N).sum(1) / self.mask_BR.sum(1).clamp(min=1)


@contextmanager
def head_on(model: PreTrainedModel, mask_BR: Tensor) -> Iterator[None]:
    """Inside, the model's logits are [N, V]: of those positions alone, row by row."""

    def gather(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, :-1][mask_BR],)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def response_logits(runs: nn.Module, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Responses:
    """A forward pass over a batch.

    Args:
        runs: what is called, the model or an engine's wrapper around it.
    """
    mask_BR = inputs["response"][:, 1:].bool()  # the positions whose next token belongs to a response
    with head_on(model, mask_BR):
        logits_NV = runs(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
    return Responses(logits_NV, inputs["input_ids"][:, 1:][mask_BR], mask_BR)
