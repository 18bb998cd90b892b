"""Where a model's final answer stands in what it wrote: reasoning in tags, or messages in channels.

The table of what is understood is `KNOWN`. A template that speaks of reasoning in any other way is refused, since the
judge would read the reasoning as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError


@dataclass(frozen=True)
class Block:
    """Reasoning between two marks; all else is the answer. `others`: marks of the format that hold no text."""

    opens: str
    closes: str
    others: tuple[str, ...] = ()

    @property
    def marks(self) -> frozenset[str]:
        """The texts that tell the format."""
        return frozenset((self.opens, self.closes, *self.others))

    message_end: str | None = None

    def begun(self, generation_prompt: str) -> str:
        """What the generation prompt has written of the reply already: the mark of a block that it leaves open."""
        return self.opens if generation_prompt.rfind(self.opens) > generation_prompt.rfind(self.closes) else ""

    def ending(self, generation_prompt: str) -> str:
        """What closes the reasoning that the generation prompt leaves open, before an answer."""
        return f"\n{self.closes}\n\n" if self.begun(generation_prompt) else ""

    def answer(self, written: str) -> str:
        """The text outside of every block; nothing where a block is never closed."""
        kept, rest = "", written
        while True:
            before, opened, rest = rest.partition(self.opens)
            kept += before
            if not opened:
                break
            _, closed, rest = rest.partition(self.closes)
            if not closed:
                return ""
        # A block may have been opened out of sight, in the prompt.
        answer = kept.rpartition(self.closes)[2].strip()
        wrapped = _ANSWER_TAGS.match(answer)
        return wrapped.group("text") if wrapped else answer


@dataclass(frozen=True)
class Channels:
    """Messages, each in a channel (OpenAI's harmony); the last one in `final` is the answer."""

    marks: frozenset[str] = frozenset({"<|channel|>"})
    message_end: str | None = "<|end|>"  # ends a message, which need not be the turn's last

    def begun(self, generation_prompt: str) -> str:
        """The head of the message that the generation prompt begins."""
        return generation_prompt.rpartition("<|start|>")[2]

    def ending(self, generation_prompt: str) -> str:
        """The head of an answer, as far as the generation prompt has not written it."""
        return "" if "<|message|>" in self.begun(generation_prompt) else "<|channel|>final<|message|>"

    def answer(self, written: str) -> str:
        """The last final message; nothing where there is none."""
        answer = ""
        for message in written.split("<|start|>"):
            head, _, text = message.partition("<|message|>")
            channel = re.match(r"\w+", head.partition("<|channel|>")[2])
            if channel and channel.group() == "final":
                answer = re.split(r"<\|(?:end|return|call)\|>", text)[0]
        return answer


Reasoning = Block | Channels

KNOWN: tuple[Reasoning, ...] = (
    Block("<think>", "</think>"),
    Block("[THINK]", "[/THINK]"),
    Block("<|channel>", "<channel|>", ("<|think|>",)),
    Block("<|START_THINKING|>", "<|END_THINKING|>"),
    Block("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    Channels(),
)
"""Qwen, DeepSeek, GLM and most; Mistral; Gemma; Cohere; Kimi; gpt-oss."""

_ANSWER_TAGS = re.compile(r"<(?P<tag>answer|response)>\s*(?P<text>.*?)\s*(?:</(?P=tag)>\s*)?\Z", re.DOTALL)
_MARK = re.compile(
    r"[<\[\u25c1][|/]{0,2}[\w:\u2581-]*(?:think|thought|reason|channel|reflect|scratchpad)[\w:\u2581-]*\|?[>\]\u25b7]",
    re.IGNORECASE,
)
_SWITCH = re.compile(r"\b(?:enable_thinking|thinking|reasoning_content|reasoning_effort|reasoning_strength)\b")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def reasoning_of(template: str, vocabulary: Iterable[str], kwargs: Mapping[str, Any], name: str) -> Reasoning | None:
    """How a model reasons, by its chat template and the added tokens of its vocabulary; None: it does not.

    Raises:
        UserError: a mark or a switch of reasoning that belongs to no known format, unless `kwargs` turn it off.
    """
    template = _COMMENT.sub("", template)
    said = set(_MARK.findall(template))
    marks = said | {token for token in vocabulary if _MARK.fullmatch(token)}
    strange = sorted(marks - frozenset().union(*(known.marks for known in KNOWN)))
    found = [known for known in KNOWN if known.marks & said] or [known for known in KNOWN if known.marks & marks]
    switch = _SWITCH.search(template)
    turned_off = any(kwargs.get(key) is False for key in ("enable_thinking", "thinking"))
    if not found and switch and not strange:
        strange = [switch.group()]
    if (strange and not turned_off) or len(found) > 1:
        strange = strange or sorted(mark for known in found for mark in known.marks & marks)
        allowed = ", ".join(" ".join(sorted(known.marks)) for known in KNOWN)
        raise UserError(
            f"model.name_or_path: chat template or vocabulary of {name!r} mark reasoning by {strange[0]!r}, which is "
            f"not understood; allowed: one of {allowed}, or model.chat_template_kwargs that turn it off "
            "(enable_thinking: false)"
        )
    return found[0] if found else None
