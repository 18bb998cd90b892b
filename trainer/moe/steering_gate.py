"""A gate on the input: a linear probe on the last prompt token decides which sequences of a batch are steered.

Shapes: B sequences, S positions, T = B x S tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.moe.backbone import Backbone

PROMPT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Gate:
    """Fires where `weight_D @ hidden_D + bias > 0`, `hidden_D` being what the router of decoder layer `layer` reads.

    `about` says how it was fitted and how well it did; it decides nothing.
    """

    layer: int
    weight_D: tuple[float, ...]
    bias: float
    about: dict[str, object]

    def fires(self, hidden_BD: Tensor) -> Tensor:
        """Which sequences are to be steered, bool [B].

        Raises:
            ValueError: hidden states of another size than the gate was fitted on.
        """
        if hidden_BD.shape[-1] != len(self.weight_D):
            raise ValueError(
                f"gate: fitted on hidden states of size {len(self.weight_D)}, the model's are {hidden_BD.shape[-1]}"
            )
        weight_D = torch.tensor(self.weight_D, dtype=torch.float32, device=hidden_BD.device)
        return hidden_BD.float() @ weight_D + self.bias > 0


def last_hidden(
    backbone: Backbone, layers: list[int], inputs: dict[str, Any], attention_mask_BS: Tensor | None
) -> dict[int, Tensor]:
    """What the routers of `layers` read at the last real position of every sequence, [B, D] fp32 by layer.

    One forward pass without a cache and without the language-model head; padding may be on either side.
    """
    shape = _shape(inputs)
    read: dict[int, Tensor] = {}

    def hook_of(index: int):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[index] = args[0].reshape(*shape, -1)

        return hook

    handles = [backbone.layer(index).router.register_forward_pre_hook(hook_of(index)) for index in layers]
    try:
        with torch.no_grad():
            backbone.model.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    sequences = torch.arange(shape[0], device=read[layers[0]].device)
    last_B = torch.full_like(sequences, shape[1] - 1)
    if attention_mask_BS is not None:
        positions_S = torch.arange(shape[1], device=attention_mask_BS.device)
        last_B = (positions_S * attention_mask_BS.bool()).argmax(-1).to(sequences.device)
    return {index: hidden_BSD[sequences, last_B].float() for index, hidden_BSD in read.items()}


class Rows:
    """Which sequences of the forward pass under way are steered; knows prefill from decoding by the cache."""

    def __init__(self, backbone: Backbone, gate: Gate):
        backbone.layer(gate.layer)  # a layer without a router is an error here, not in the first forward
        self.backbone, self.gate = backbone, gate
        self.judging = False
        self._on_B: Tensor | None = None
        self._on_T1: Tensor | None = None

    def hooks(self) -> list[RemovableHandle]:
        """Attach to the model; the handles detach it."""
        return [self.backbone.model.register_forward_pre_hook(self._before, with_kwargs=True)]

    def tokens(self, count: int) -> Tensor:
        """Bool [T, 1]: the tokens of steered sequences in the forward pass under way."""
        if self._on_T1 is None or len(self._on_T1) != count:
            raise ValueError(f"gate: a router sees {count} tokens, not sequences x positions of the model's input")
        return self._on_T1

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**({"input_ids": args[0]} if args else {}), **kwargs}
        inputs = {name: given[name] for name in PROMPT_INPUTS if given.get(name) is not None}
        sequences, positions = _shape(inputs)
        cache = given.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            mask = inputs.get("attention_mask")
            if mask is not None and mask.ndim != 2:
                raise ValueError(f"gate: needs an attention mask [sequences, positions], found {mask.ndim} dimensions")
            self.judging = True
            try:
                hidden_BD = last_hidden(self.backbone, [self.gate.layer], inputs, mask)[self.gate.layer]
            finally:
                self.judging = False
            self._on_B = self.gate.fires(hidden_BD)
        elif self._on_B is None or len(self._on_B) != sequences:
            judged = "no" if self._on_B is None else len(self._on_B)
            raise ValueError(f"gate: {sequences} sequences to continue, {judged} prompts were judged")
        self._on_T1 = self._on_B.repeat_interleave(positions).unsqueeze(1)


def _shape(inputs: dict[str, Any]) -> tuple[int, int]:
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]
