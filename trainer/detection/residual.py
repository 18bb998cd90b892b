"""The residual stream behind every decoder layer, at the last token of a prompt: where a reply is decided.

Shapes: P prompts, L decoder layers (dense ones counted), D hidden size, B prompts of a batch, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.schema import Conversation
from trainer.model.chat import Chat, ChatTurn, batches
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import decoder_layers, is_sharded
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


@torch.no_grad()
def last_token_states(
    backbone: Backbone, chat: Chat, prompts: Sequence[Conversation], batch_size: int, label: str
) -> NDArray[np.float32]:
    """[P, L, D] in the order of the prompts, the generation prompt included. Collective."""
    turns = [ChatTurn(ids, len(ids)) for ids in map(chat.opening, prompts)]
    model, layers = backbone.model.eval(), list(decoder_layers(backbone).values())
    read: dict[int, Tensor] = {}

    def keep(module: nn.Module, _args: object, output: Any) -> None:
        read[id(module)] = output[0] if isinstance(output, tuple) else output

    every = list(batches(turns, chat.padding, batch_size))
    found: dict[int, NDArray[np.float32]] = {}
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        for number, (_, batch) in progress(dealt(every, together=is_sharded(model)), label):
            batch = batch.to(model.device)
            model(
                input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False, logits_to_keep=1
            )
            rows_B = torch.arange(len(batch.input_ids_BS), device=model.device)
            last_B = batch.attention_mask_BS.sum(-1) - 1
            states = [read[id(layer)].view(*batch.input_ids_BS.shape, -1)[rows_B, last_B] for layer in layers]
            found[number] = torch.stack(states, 1).float().cpu().numpy()
    finally:
        for handle in handles:
            handle.remove()
    joined = np.concatenate(from_all_ranks(found))
    return joined[np.argsort(np.concatenate([rows for rows, _ in every]))]
