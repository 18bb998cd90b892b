"""Activation counts: on how many counted tokens the router chose each expert, adversarial against anchor.

One teacher-forced batched forward records the indices the routers returned; generation is not involved.

Shapes: P pairs, L MoE layers, E experts, T tokens (batch x positions), K chosen experts per token, B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.detection.pairs import Pair
from trainer.model.chat import Chat, ChatTurn, Tokens, batches
from trainer.moe.backbone import Backbone
from trainer.moe.routing import record
from trainer.moe.sharding import is_sharded
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


@dataclass(frozen=True)
class Side:
    """Counts of one side of the pairs: hits [P, L, E] (int64), gate mass [P, L, E] (float64), tokens [P] (int64)."""

    hits_PLE: NDArray[np.int64]
    mass_PLE: NDArray[np.float64]
    tokens_P: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Side:
        return Side(self.hits_PLE[rows], self.mass_PLE[rows], self.tokens_P[rows])

    @classmethod
    def joined(cls, parts: Sequence[Side]) -> Side:
        """The pairs of several counts, in their order."""
        return cls(
            np.concatenate([part.hits_PLE for part in parts]),
            np.concatenate([part.mass_PLE for part in parts]),
            np.concatenate([part.tokens_P for part in parts]),
        )

    def active(self) -> NDArray[np.int64]:
        """Tokens on which each expert is active, pooled over pairs, [L, E]."""
        return self.hits_PLE.sum(0)

    @property
    def tokens(self) -> int:
        return int(self.tokens_P.sum())


@dataclass(frozen=True)
class Counts:
    """Both sides of the pairs, with the decoder-layer index and the number of experts of every MoE layer.

    Layers may differ in their number of experts; E is the largest and the surplus columns stay zero.
    """

    adversarial: Side
    anchor: Side
    layers: list[int]
    experts: list[int]

    def __len__(self) -> int:
        return len(self.adversarial.tokens_P)

    def take(self, rows: NDArray[np.int64]) -> Counts:
        """The counts of the given pairs, repeats allowed (bootstrap)."""
        return Counts(self.adversarial.take(rows), self.anchor.take(rows), self.layers, self.experts)

    def scored(self, scores_LE: NDArray[np.float64]) -> pd.DataFrame:
        """`frame` with the score of every expert."""
        scores = np.concatenate([scores_LE[i, :n] for i, n in enumerate(self.experts)])
        return self.frame().assign(score=scores)

    def frame(self) -> pd.DataFrame:
        """Rows of `activations.parquet`: a active, d not active; 1 adversarial, 2 anchor (SteerMoE's names)."""
        a1_LE, a2_LE = self.adversarial.active(), self.anchor.active()
        rows = [
            (
                layer,
                e,
                a1_LE[i, e],
                self.adversarial.tokens - a1_LE[i, e],
                a2_LE[i, e],
                self.anchor.tokens - a2_LE[i, e],
            )
            for i, layer in enumerate(self.layers)
            for e in range(self.experts[i])
        ]
        return pd.DataFrame(rows, columns=["layer", "expert", "a1", "d1", "a2", "d2"])


def count_activations(
    backbone: Backbone, chat: Chat, pairs: Sequence[Pair], tokens: Tokens, batch_size: int
) -> Counts:
    """Count expert activations of every pair on the tokens named by `tokens`."""
    adversarial = [chat.encode(p.adversarial_prompt, p.adversarial_reply) for p in pairs]
    anchor = [chat.encode(p.goal.conversation, p.anchor_reply) for p in pairs]
    named = {"adversarial activations": adversarial, "anchor activations": anchor}
    return count_sides(backbone, named, tokens, batch_size, chat.padding)


def count_sides(
    backbone: Backbone, named: Mapping[str, Sequence[ChatTurn]], tokens: Tokens, batch_size: int, padding: int
) -> Counts:
    """Count two kinds of turns: label of the progress bar -> turns, adversarial ones first, then anchors."""
    adversarial, anchor = (
        count_turns(backbone, turns, tokens, batch_size, padding, label) for label, turns in named.items()
    )
    return Counts(adversarial, anchor, [layer.index for layer in backbone], [layer.num_experts for layer in backbone])


@torch.no_grad()
def count_turns(
    backbone: Backbone, turns: Sequence[ChatTurn], tokens: Tokens, batch_size: int, padding: int, label: str
) -> Side:
    width = max(layer.num_experts for layer in backbone)
    model = backbone.model.eval()
    every = list(batches(turns, padding, batch_size))
    found: dict[int, Side] = {}
    for number, (_, batch) in progress(dealt(every, together=is_sharded(model)), label):
        batch = batch.to(model.device)
        span_BS = batch.span(tokens)
        with record(backbone) as trace:
            model(
                input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False, logits_to_keep=1
            )
        hits, mass = [], []
        for layer in backbone:
            index, weights = trace.index_TK[layer.index], trace.weights_TK[layer.index]
            hits.append(per_sequence(index, torch.ones_like(weights), span_BS, width).long().cpu().numpy())
            mass.append(per_sequence(index, weights, span_BS, width).cpu().numpy())
        found[number] = Side(np.stack(hits, 1), np.stack(mass, 1), span_BS.sum(1).cpu().numpy())
    counted = Side.joined(from_all_ranks(found))
    # Batches are sorted by length: back to the order of the pairs.
    return counted.take(np.argsort(np.concatenate([rows for rows, _ in every])))


def per_sequence(index_TK: Tensor, value_TK: Tensor, span_BS: Tensor, num_experts: int) -> Tensor:
    """Sum `value_TK` by (sequence, expert) over the tokens of a span, [B, E] in fp64; padding is never in a span."""
    num_sequences, length = span_BS.shape
    masked_TK = value_TK.double() * span_BS.reshape(-1, 1)
    sequence_T1 = torch.arange(num_sequences, device=index_TK.device).repeat_interleave(length).unsqueeze(1)
    flat_TK = sequence_T1 * num_experts + index_TK.long()
    sums = torch.zeros(num_sequences * num_experts, dtype=torch.float64, device=index_TK.device)
    return sums.index_add_(0, flat_TK.reshape(-1), masked_TK.reshape(-1)).view(num_sequences, num_experts)
