"""How a model is talked to: conversations and replies as tokens, with their spans (prompt, response, padding).

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.model.reasoning import Block, Reasoning, reasoning_of
from trainer.model.reply import Reply
from trainer.model.tokenizer import TEMPLATE_ERRORS
from trainer.recipe.sections import ModelSection

Tokens = Literal["prompt", "response", "both"]

_PROBE = "Zanzibar"  # a word that no template writes itself
_OPENINGS = 16_384
"""Conversations whose tokens are kept."""


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
    """One model's way of being talked to. Prompts and replies become tokens here and nowhere else, and back.

    `system_prompt`: put before every conversation that has no system turn. `template_kwargs`: what the chat template
    is given besides. `listed_stops`: the tokens that the checkpoint's generation config lets end a reply.
    `vocabulary`: rows of the model's embedding; None: unknown. `Chat.of` takes them from a model and a recipe.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    listed_stops: tuple[int, ...] = ()
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> Chat:
        """The chat of a model whose template `read_tokenizer` has tried.

        Raises:
            UserError: a template that reasons in a way that is not understood, has no system role where a system
                prompt is given, or does not know a given key.
        """
        listed = getattr(model.generation_config, "eos_token_id", None)
        stops = tuple(listed) if isinstance(listed, (list, tuple)) else () if listed is None else (listed,)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        chat = cls(tokenizer, section.system_prompt, dict(section.chat_template_kwargs), stops, vocabulary)
        chat._check_settings()
        _ = chat.reasoning  # refuses what is not understood
        return chat

    def _check_settings(self) -> None:
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for key in self.template_kwargs:
            if key in own:
                raise UserError(f"model.chat_template_kwargs: {key!r} is set by the product itself; leave it out")
            if not re.search(rf"\b{re.escape(key)}\b", self._template):
                raise UserError(
                    f"model.chat_template_kwargs: {key!r} changes nothing: {self._where} does not mention it; "
                    "allowed: variables of the template"
                )
        if self.system_prompt is not None and not self.knows_system:
            raise UserError(
                f"model.system_prompt: {self._where} has no system role; allowed: null, with the text in the prompts"
            )

    # --- what the template says -------------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"

    @cached_property
    def _template(self) -> str:
        return str(self.tokenizer.get_chat_template())

    def _render(self, messages: list[dict[str, str]], **more: Any) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, **{**self.template_kwargs, **more})
            )
        except TEMPLATE_ERRORS as e:
            roles = ", ".join(message["role"] for message in messages)
            said = " ".join(str(e).split())[:200] or type(e).__name__
            raise UserError(f"model.name_or_path: {self._where} refuses turns of {roles}: {said}") from e

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def knows_system(self) -> bool:
        """Whether a system turn's text gets into the prompt, in a turn of its own or folded into the user's."""
        try:
            turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello."}]
            return _PROBE in self._render(turns, add_generation_prompt=True)
        except UserError:
            return False

    @cached_property
    def _generation_prompt(self) -> str:
        text = self._render([{"role": "user", "content": _PROBE}], add_generation_prompt=True)
        return text.rpartition(_PROBE)[2]

    @cached_property
    def reasoning(self) -> Reasoning | None:
        """How this model reasons before it answers; None: it does not. Raises `UserError` where not understood."""
        added = [str(token.content) for token in self.tokenizer.added_tokens_decoder.values()]
        return reasoning_of(self._template, added, self.template_kwargs, self.tokenizer.name_or_path)

    @cached_property
    def _after_answer(self) -> tuple[list[int], list[int]]:
        """The special tokens right behind an answer: the last of a conversation, and one before a further question."""
        turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _PROBE}]
        further = [*turns, {"role": "user", "content": "Hello."}]
        texts = [self._render(messages) for messages in (turns, further)]
        tokens = {str(token.content) for token in self.tokenizer.added_tokens_decoder.values()}
        tokens |= set(self.tokenizer.all_special_tokens)
        run = re.compile(rf"\s*((?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})*)")
        last, before = (
            self._tokens(found.group(1)) if tokens and (found := run.match(text.rpartition(_PROBE)[2])) else []
            for text in texts
        )
        return last, before

    # --- ends and padding -------------------------------------------------------------------------

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends an answer: the template's, else the checkpoint's; None where nothing says one."""
        eos = self.tokenizer.eos_token_id
        known = [token for token in (eos, *self.listed_stops) if token is not None]
        last, before = self._after_answer
        message_end = self.reasoning.message_end if self.reasoning else None
        if message_end is not None:
            last = [token for token in last if token != self.tokenizer.convert_tokens_to_ids(message_end)]
        # Where a template closes a response and then the turn, the checkpoint says which of the two is the end; one
        # that closes nothing (GLM) ends at the next turn's opening, where the checkpoint lists that.
        listed = [token for token in last if token in known] or last[:1]
        listed = listed or [token for token in before if token in self.listed_stops] or known
        return int(listed[0]) if listed else None

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Every token that ends a reply: the template's, the generation config's and the tokenizer's; ascending."""
        named = (self.turn_end, self.tokenizer.eos_token_id, *self.listed_stops)
        return tuple(sorted({int(token) for token in named if token is not None}))

    @property
    def padding(self) -> int:
        """A token for padding that the model has an embedding of; which one does not matter, since it is masked."""
        named = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in named if token is not None and self._embedded(token)), 0)

    def _embedded(self, token: int) -> bool:
        return self.vocabulary is None or 0 <= token < self.vocabulary

    # --- to tokens and back -----------------------------------------------------------------------

    def opening(self, conversation: Conversation) -> list[int]:
        """The conversation as tokens, up to and with those that open the assistant's turn.

        Where the conversation makes the answer begin, these words follow: behind the reasoning, where the template
        has opened one or answers stand in a channel.

        Raises:
            UserError: a template that refuses these turns or has no system role, or a token without an embedding.
        """
        return list(self._opened(conversation))

    @cached_property
    def _opened(self) -> Callable[[Conversation], tuple[int, ...]]:
        # The same prompts are asked before and after, of every control, and in training.
        def opened(conversation: Conversation) -> tuple[int, ...]:
            text = self._render(self._messages(conversation), add_generation_prompt=True)
            text += self._before_opening(conversation) + conversation.opening
            return tuple(self._all_embedded(self._tokens(text)))

        return lru_cache(maxsize=_OPENINGS)(opened)

    def _before_opening(self, conversation: Conversation) -> str:
        if not conversation.opening or self.reasoning is None:
            return ""
        return self.reasoning.ending(self._generation_prompt)

    def encode(self, conversation: Conversation, reply: Reply) -> ChatTurn:
        """A conversation and the reply to its last turn as tokens; raises as `opening`.

        What a model wrote is `reply.ids`, token by token: a reply that was cut gets no end. A reply given as text
        stands where the template puts a final answer, and ends as an answer of this model ends. Behind an answer that
        was made to begin there is no reasoning: of a reply that has some, its final answer follows as text.
        """
        opening = self.opening(conversation)
        if conversation.opening and (reply.ids is None or self._reasons(reply.ids)):
            ids = self._behind(conversation.opening, reply)
        else:
            ids = self._given(conversation, reply, opening) if reply.ids is None else list(reply.ids)
        return ChatTurn([*opening, *self._all_embedded(ids)], len(opening))

    def reply(self, ids: Sequence[int], conversation: Conversation | None = None) -> Reply:
        """What a model generated as a reply; behind the first token that ends a turn there is only padding.

        `conversation`: what it replies to, which is needed where that makes the answer begin.
        """
        end = next((at for at, token in enumerate(ids) if token in self.stops), None)
        ids = tuple(ids if end is None else ids[: end + 1])
        begun = self._before_opening(conversation) if conversation else ""
        return Reply(self._answer(ids, begun), ids, end is not None)

    def whole(self, reply: Reply) -> str:
        """All that a model wrote, its reasoning too, without special tokens and outer spaces."""
        if reply.ids is None:
            return reply.text
        return str(self.tokenizer.decode(list(reply.ids), skip_special_tokens=True)).strip()

    def _messages(self, conversation: Conversation) -> list[dict[str, str]]:
        messages = conversation.messages()
        has_system = any(message["role"] == "system" for message in messages)
        if has_system and not self.knows_system:
            raise UserError(f"data: a conversation has a system turn, but {self._where} has no system role")
        if self.system_prompt is None or has_system:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _given(self, conversation: Conversation, reply: Reply, opening: list[int]) -> list[int]:
        messages = self._messages(conversation)
        answered = [*messages, {"role": "assistant", "content": reply.text}]
        before, after = self._render(messages, add_generation_prompt=True), self._render(answered)
        ids = self._tokens(after)
        if ids[: len(opening)] == opening:
            ids = ids[len(opening) :]
        elif after.startswith(before):
            ids = self._tokens(after.removeprefix(before))
        else:
            ending = self.reasoning.ending(self._generation_prompt) if self.reasoning else ""
            ids = self._tokens(ending + reply.text)
        return self._ended(ids, reply)

    def _behind(self, opening: str, reply: Reply) -> list[int]:
        gap = "" if opening[-1:].isspace() else " "
        return self._ended(self._tokens(gap + reply.text), reply)

    def _ended(self, ids: list[int], reply: Reply) -> list[int]:
        end = self.turn_end
        if end in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(end)]
        return ids if end is None or not reply.finished else [*ids, end]

    def _reasons(self, ids: Sequence[int]) -> bool:
        raw = str(self.tokenizer.decode(list(ids)))
        return self.reasoning is not None and any(mark in raw for mark in self.reasoning.marks)

    def _answer(self, ids: Sequence[int], begun: str = "") -> str:
        bare = str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        if self.reasoning is None:
            return bare
        raw = self.reasoning.begun(self._generation_prompt) + begun + str(self.tokenizer.decode(list(ids)))
        if isinstance(self.reasoning, Block) and not any(mark in raw for mark in self.reasoning.marks):
            return bare
        answer = self.reasoning.answer(raw)
        for token in self._unspoken:
            answer = answer.replace(token, "")
        return answer.strip()

    @cached_property
    def _unspoken(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({*self.tokenizer.all_special_tokens, *(t.content for t in added if t.special)}, key=len)[::-1]

    def _all_embedded(self, ids: list[int]) -> list[int]:
        outside = next((token for token in ids if not self._embedded(token)), None)
        if outside is not None:
            raise UserError(
                f"model.name_or_path: the tokenizer of {self.tokenizer.name_or_path!r} writes token {outside} "
                f"({self.tokenizer.convert_ids_to_tokens(outside)!r}), but the model's embedding ends at "
                f"{cast(int, self.vocabulary) - 1}; allowed: a tokenizer and an embedding that belong together"
            )
        return ids


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
