"""What the head routes by: hidden states of one layer at the end of the prompt, of the base and under each adapter.

Computed once for the training prompts and kept, so that the head is fitted without the language model; at inference
the same function reads the prompt that is to be answered.

Shapes: N prompts, B rows, S positions (left-padded), V views (the base first, then each axis), D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.generation import left_pad
from trainer.methods.alignx.adapters import AxisAdapters
from trainer.methods.alignx.recipe import FeaturesSection
from trainer.model.chat import Chat
from trainer.moe.modes import evaluating
from trainer.moe.sharding import decoder_layers
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


class Views:
    """Reads the routing features of a model with adapters.

    Args:
        axes: the adapters that are looked through, in the order of the views.

    Raises:
        UserError: the model has no layer `features.layer`.
    """

    def __init__(self, adapters: AxisAdapters, axes: Sequence[str], section: FeaturesSection):
        self.adapters, self.axes, self.section = adapters, tuple(axes), section
        layers = list(decoder_layers(adapters.backbone).values())
        if section.layer is not None and section.layer >= len(layers):
            raise UserError(f"features.layer: found {section.layer}; the model has layers 0 to {len(layers) - 1}")
        self._layer: nn.Module | None = None if section.layer is None else layers[section.layer]

    @torch.no_grad()
    def read(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Features [B, V, D], fp32, of left-padded prompts, a pass per view; padding does not enter them.

        All views in one pass would hold V times the activations, which costs more memory than the adapters do.
        """
        views = []
        for acting in ((), *((axis,) for axis in self.axes)):
            with self.adapters.acting(*acting), evaluating(self.adapters.model):
                views.append(self._read(self._hidden(ids_BS, mask_BS).float(), mask_BS))
        return torch.stack(views, 1)

    def _read(self, hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        if self.section.position == "last":
            return hidden_BSD[:, -1].clone()
        mask_BS1 = mask_BS.unsqueeze(-1).float()
        return (hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)

    def of_prompts(self, chat: Chat, prompts: Sequence[Conversation], label: str) -> Tensor:
        """Features [N, V, D] of prompts, fp32, on the CPU. Batches are dealt to the processes. Collective."""
        rows = [chat.opening(prompt) for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        size = self.section.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: dict[int, Tensor] = {}
        for number, batch in progress(dealt(batches, together=False), label):
            ids_BS, mask_BS = left_pad([rows[index] for index in batch], chat.padding, self.adapters.model.device)
            found[number] = self.read(ids_BS, mask_BS).cpu()
        read_NVD = torch.cat(from_all_ranks(found))
        back_N = torch.tensor([index for batch in batches for index in batch]).argsort()
        return read_NVD[back_N]

    def _hidden(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        decoder = cast(Any, self.adapters.model).get_decoder()
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        with _output_of(self._layer) as kept:
            out = decoder(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False)
        hidden_BSD: Tensor = out.last_hidden_state if self._layer is None else kept[0]
        return hidden_BSD


@contextmanager
def _output_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """The hidden states that a decoder layer gives on, in the list."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = None if layer is None else layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        if handle is not None:
            handle.remove()
