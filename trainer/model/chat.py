"""Teacher-forced sequences with their spans: which tokens are the prompt, which the response, which padding.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.model.reply import Reply

Tokens = Literal["prompt", "response", "both"]
Messages = list[dict[str, str]]
"""Chat messages, each with `role` and `content`."""


@dataclass(frozen=True)
class ChatTurn:
    """Token ids of one chat turn; `ids[:prompt]` is the prompt with its chat markup, the rest the response."""

    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """A right-padded batch: ids, attention and spans, all [B, S]; spans are bool and never cover padding."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    prompt_BS: Tensor
    response_BS: Tensor

    def span(self, tokens: Tokens) -> Tensor:
        """Bool [B, S] of the counted tokens."""
        return {"prompt": self.prompt_BS, "response": self.response_BS, "both": self.prompt_BS | self.response_BS}[
            tokens
        ]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            *(t.to(device) for t in (self.input_ids_BS, self.attention_mask_BS, self.prompt_BS, self.response_BS))
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: Reply) -> ChatTurn:
    """One user prompt and the reply to it as tokens, through the chat template."""
    return encode_after(tokenizer, [{"role": "user", "content": prompt}], reply)


def encode_after(tokenizer: PreTrainedTokenizerBase, turns: Messages, reply: Reply) -> ChatTurn:
    """A conversation and the reply to its last turn as tokens.

    This is the one place that turns a reply into tokens; they are those of its text, not `reply.ids`. Templates that
    rewrite the assistant turn (thinking tags, say) do not extend the generation prompt; there the text's own tokens
    and the end-of-sequence token follow it, which is what generation produces.
    """
    opening = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply.text}], return_dict=False)
    if whole[: len(opening)] != opening:
        ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        whole = opening + tokenizer(reply.text, add_special_tokens=False)["input_ids"] + ending
    return ChatTurn(list(whole), len(opening))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end-of-sequence token where the tokenizer names none (padding is masked anyway)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def pad(sequences: Sequence[ChatTurn], padding: int) -> Batch:
    """Right-pad sequences into one batch."""
    length = max(len(s.ids) for s in sequences)
    shape = (len(sequences), length)
    ids = torch.full(shape, padding)
    attention, prompt, response = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for row, sequence in enumerate(sequences):
        end = len(sequence.ids)
        ids[row, :end] = torch.tensor(sequence.ids)
        attention[row, :end] = True
        prompt[row, : sequence.prompt] = True
        response[row, sequence.prompt : end] = True
    return Batch(ids, attention.long(), prompt, response)


def batches(sequences: Sequence[ChatTurn], padding: int, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of similar length, longest first so that memory peaks at once: (positions in `sequences`, batch)."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, pad([sequences[i] for i in rows], padding)
