"""How a model is talked to: conversations and replies as tokens, with their spans (prompt, response, padding).

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.schema import Conversation
from trainer.model.reply import Reply

Tokens = Literal["prompt", "response", "both"]


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


@dataclass(frozen=True)
class Chat:
    """One model's way of being talked to. Prompts and replies become tokens here and nowhere else."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def padding(self) -> int:
        """The padding token, or the end-of-sequence token where there is none (padding is masked anyway)."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def opening(self, conversation: Conversation) -> list[int]:
        """The conversation as tokens, up to and with those that open the assistant's turn."""
        return list(
            self.tokenizer.apply_chat_template(conversation.messages(), add_generation_prompt=True, return_dict=False)
        )

    def encode(self, conversation: Conversation, reply: Reply) -> ChatTurn:
        """A conversation and the reply to its last turn as tokens.

        They are those of the reply's text, not `reply.ids`. Templates that rewrite the assistant turn (thinking tags,
        say) do not extend the generation prompt; there the text's own tokens and the end-of-sequence token follow it,
        which is what generation produces.
        """
        tokenizer, opening = self.tokenizer, self.opening(conversation)
        if reply.ids is not None:
            return ChatTurn([*opening, *reply.ids], len(opening))
        messages = [*conversation.messages(), {"role": "assistant", "content": reply.text}]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        if whole[: len(opening)] != opening:
            ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            whole = opening + tokenizer(reply.text, add_special_tokens=False)["input_ids"] + ending
        return ChatTurn(list(whole), len(opening))


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
