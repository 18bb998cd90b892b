"""Stage 2 at work: prompts are routed once, then answered by the mixture of axis adapters.

weights   every adapter acts, scaled by its alpha: one pass per token, about the base's cost
top1      the same with the largest alpha at 1 and the others at 0
hidden    y = sum_i alpha_i h_i of the last hidden states under each adapter: exact per sample, one pass per axis

In every mode the head's output calibration lies between the last hidden state and the language model's head.

Shapes: B rows, S positions, A axes, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from data_prep.errors import UserError
from trainer.methods.alignx.features import Views

Mode = Literal["weights", "top1", "hidden"]


class Router(Protocol):
    """What a mixture asks of the head."""

    def alpha(self, features_BVD: Tensor) -> Tensor:
        """Weights [B, A] of the axes, fp32; every row sums to 1."""

    def correct(self, hidden_BSH: Tensor) -> Tensor:
        """Calibrated last hidden states."""


class Uniform:
    """The same weight for every axis and no output calibration: what a mixture is without a head."""

    def __init__(self, weight: float):
        self.weight = weight

    def alpha(self, features_BVD: Tensor) -> Tensor:
        return torch.full((features_BVD.shape[0], features_BVD.shape[1] - 1), self.weight)

    def correct(self, hidden_BSH: Tensor) -> Tensor:
        return hidden_BSH


class Mixture(nn.Module):
    """A model of axis adapters with transformers' `generate`: prompts are routed, then answered.

    Prompts are padded on the left. A call of the module itself is routed by all the tokens that it is given.
    """

    def __init__(self, views: Views, head: Router, mode: Mode):
        super().__init__()
        self.views, self.head, self.mode = views, head, mode
        self.model = views.adapters.model

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def generation_config(self) -> GenerationConfig | None:
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.model.generation_config = config

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The weights [B, A] of the axes for left-padded prompts, fp32, as the mode uses them."""
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.used(self.views.read(input_ids, mask_BS))

    def used(self, features_BVD: Tensor) -> Tensor:
        """The weights [B, A] that the mode uses for these features."""
        alpha_BA = self.head.alpha(features_BVD).to(features_BVD.device)
        if self.mode == "top1":
            return nn.functional.one_hot(alpha_BA.argmax(-1), alpha_BA.shape[-1]).float()
        return alpha_BA

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor:
        """As `transformers.GenerationMixin.generate`; returns prompts and replies, [B, S'].

        Raises:
            UserError: beams in mode `hidden`, whose caches they would not reorder.
        """
        config = arguments.get("generation_config") or self.generation_config
        beams = arguments.get("num_beams") or getattr(config, "num_beams", 1) or 1
        if self.mode == "hidden" and beams > 1:
            raise UserError(f"num_beams: found {beams}; mode hidden allows 1, modes weights and top1 any number")
        with self.mixed(self.route(input_ids, attention_mask)):
            run = cast(Any, self.model).generate
            found: Tensor = run(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
        with self.mixed(self.route(input_ids, attention_mask)):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **arguments)

    @contextmanager
    def mixed(self, alpha_BA: Tensor) -> Iterator[None]:
        """Inside, the model computes as the mixture of these weights, one row for each prompt."""
        decoder = cast(Any, self.model).get_decoder()
        own = decoder.forward
        mixing = nullcontext() if self.mode == "hidden" else self.views.adapters.weighted(alpha_BA)
        decoder.forward = self._hidden(own, alpha_BA) if self.mode == "hidden" else self._corrected(own)
        try:
            with mixing:
                yield
        finally:
            del decoder.forward

    def _corrected(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            out.last_hidden_state = self.head.correct(out.last_hidden_state).to(out.last_hidden_state.dtype)
            return out

        return forward

    def _hidden(self, own: Callable[..., Any], alpha_BA: Tensor) -> Callable[..., Any]:
        """A decoder's forward: a pass per axis, each with a cache of its own."""
        axes, caches = self.views.axes, dict[int, Any]()

        def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            if past_key_values is not None and past_key_values.get_seq_length() == 0:
                caches.update({number: copy.deepcopy(past_key_values) for number in range(1, len(axes))})
            first, mixed = None, None
            for number, axis in enumerate(axes):
                cache = past_key_values if number == 0 or past_key_values is None else caches[number]
                with self.views.adapters.acting(axis):
                    out = own(*args, past_key_values=cache, **kwargs)
                hidden_BSD = out.last_hidden_state
                alpha_B11 = _rows(alpha_BA[:, number], hidden_BSD)
                part = alpha_B11 * hidden_BSD.float()
                first, mixed = first or out, part if mixed is None else mixed + part
            assert first is not None and mixed is not None
            first.last_hidden_state = self.head.correct(mixed.to(hidden_BSD.dtype)).to(hidden_BSD.dtype)
            return first

        return forward


def _rows(alpha_B: Tensor, hidden_BSD: Tensor) -> Tensor:
    """[B, 1, 1], of which samples of one prompt, side by side, take that prompt's."""
    times = hidden_BSD.shape[0] // alpha_B.shape[0]
    return alpha_B.repeat_interleave(times)[:, None, None].to(hidden_BSD.device)
