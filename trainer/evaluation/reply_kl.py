"""How far an edit moves what a model says to harmless prompts: KL of its next-token distributions on its own replies.

Shapes: B rows, S positions, R response positions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from trainer.model.chat import Batch, Chat, ChatTurn, batches
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import is_sharded
from trainer.runtime.processes import dealt, from_all_ranks


@torch.no_grad()
def reply_kl(
    backbone: Backbone,
    chat: Chat,
    turns: Sequence[ChatTurn],
    edited: Callable[[], AbstractContextManager[object]],
    batch_size: int,
) -> float:
    """Mean over turns of the mean over their response tokens of KL(original || edited), in nats. Collective.

    Args:
        edited: the model under the edit, inside.
    """
    every = list(batches(turns, chat.padding, batch_size))
    found: dict[int, tuple[float, int]] = {}
    for number, (rows, batch) in dealt(every, together=is_sharded(backbone.model)):
        before_RV = _log_probabilities(backbone, batch)
        with edited():
            after_RV = _log_probabilities(backbone, batch)
        kl_R = (before_RV.exp() * (before_RV - after_RV)).sum(-1)
        response_BS = batch.response_BS.to(kl_R.device)
        row_R = torch.arange(len(rows), device=kl_R.device)[:, None].expand_as(response_BS)[response_BS]
        sums_B = torch.zeros(len(rows), dtype=torch.float64, device=kl_R.device).index_add_(0, row_R, kl_R.double())
        found[number] = float((sums_B / response_BS.sum(1)).sum()), len(rows)
    measured = from_all_ranks(found)
    return sum(total for total, _ in measured) / sum(number for _, number in measured)


def _log_probabilities(backbone: Backbone, batch: Batch) -> Tensor:
    """[R, V] in fp32, of every response token given what is before it."""
    batch = batch.to(backbone.model.device)
    logits_BSV = backbone.model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits
    before_BS = torch.roll(batch.response_BS, -1, 1)
    return logits_BSV[before_BS].float().log_softmax(-1)
