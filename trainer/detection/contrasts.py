"""SteerMoE's pairs (x1, x2): x1 shows the wanted behaviour, x2 the opposite, and one span of each is compared.

Routing is causal, so a sequence cut off behind its span gives the span the same routing as the whole one: every side
becomes a `ChatTurn` whose "response" is the span, and is counted as RASA's pairs are.

Shapes: P pairs, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from data_prep.errors import UserError, unknown
from data_prep.json_lines import read_json_lines
from data_prep.schema import Conversation, Prompt, Speaker, Turn
from trainer.detection.counts import Counts, Side, count_sides
from trainer.detection.pairs import Pair
from trainer.model.chat import Chat, ChatTurn
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone

Messages = list[dict[str, str]]
"""Chat messages, each with `role` and `content`."""


@dataclass(frozen=True)
class Contrast:
    """One pair as token ids that end with the compared span, which begins at `prompt`. Texts stay in memory."""

    id: str
    x1: ChatTurn
    x2: ChatTurn


def safety(chat: Chat, pairs: Sequence[Pair], refusal: str | None) -> list[Contrast]:
    """The same jailbroken prompt, refused (x1) or answered as the model did (x2); response tokens.

    `refusal` is a fixed sentence; None takes the model's own refusal of the plain goal.
    """
    fixed = Reply.written(refusal) if refusal else None
    return [
        Contrast(
            f"{pair.goal.id} in {pair.wrapper.id}",
            chat.encode(pair.adversarial_prompt, fixed or pair.anchor_reply),
            chat.encode(pair.adversarial_prompt, pair.adversarial_reply),
        )
        for pair in pairs
    ]


def safety_from_answers(chat: Chat, prompts: Sequence[Prompt], refusal: str) -> list[Contrast]:
    """The same prompt, refused (x1) or with the data set's unsafe reply (x2); response tokens.

    Raises:
        UserError: a prompt without a reply; names it by id.
    """
    missing = [prompt.id for prompt in prompts if not (prompt.answer and prompt.answer.strip())]
    if missing:
        raise UserError(
            f"data.harmful: prompt {missing[0]!r} has no unsafe reply ({len(missing)} without); "
            "steer.unsafe: answer needs a column 'answer' or 'output', steer.unsafe: own asks the model"
        )
    fixed = Reply.written(refusal)
    return [
        Contrast(p.id, chat.encode(p.conversation, fixed), chat.encode(p.conversation, Reply.written(str(p.answer))))
        for p in prompts
    ]


def faithfulness(chat: Chat, path: Path) -> list[Contrast]:
    """With a document (x1) and without (x2); the question's tokens. JSON Lines of `document`, `question`, opt. `id`.

    Raises:
        UserError: a file that cannot be read so, or a question that the chat template does not leave findable.
    """
    found = []
    for name, row in _rows(path, ("document", "question"), ("id",)):
        document, question = str(row["document"]), str(row["question"])
        texts = (f"Document: {document}\nQuestion: {question}", f"Question: {question}")
        x1, x2 = ([{"role": "user", "content": text}] for text in texts)
        found.append(_spanned(chat, path, name, x1, x2, question))
    return found


def custom(chat: Chat, path: Path) -> list[Contrast]:
    """JSON Lines of `x1` and `x2`, each a list of chat messages, with `span`, a text found in both; opt. `id`.

    Without `span` the last assistant message of each side is compared. Where a span occurs more than once, the last
    occurrence counts.

    Raises:
        UserError: a file that cannot be read so, or a span that is not found; names the pair's id, never its text.
    """
    found = []
    for name, row in _rows(path, ("x1", "x2"), ("id", "span")):
        x1, x2 = (_messages(path, name, key, row[key]) for key in ("x1", "x2"))
        found.append(_spanned(chat, path, name, x1, x2, row.get("span")))
    return found


def count_contrasts(backbone: Backbone, chat: Chat, contrasts: Sequence[Contrast], batch_size: int) -> Counts:
    """Expert activations on the spans; `Counts.adversarial` holds x2, `Counts.anchor` holds x1."""
    named = {"activations of x2": [c.x2 for c in contrasts], "activations of x1": [c.x1 for c in contrasts]}
    return count_sides(backbone, named, "response", batch_size, chat.padding)


def activation_table(counts: Counts) -> pd.DataFrame:
    """Rows of `activations.parquet`, one per expert, with x1 the wanted side.

    `a1, d1, a2, d2`: tokens of x1 and x2 on which the expert is active, not active. `delta`: the risk difference
    `a1/(a1+d1) - a2/(a2+d2)`. `gate_mass`: difference of the mean routing weight per token. `pair_delta`: mean over
    pairs of the difference of active shares; `pair_agreement`: share of pairs in which it has `delta`'s sign. `score`
    is `-delta`, so that the report's heat map shows the unwanted side as elsewhere.
    """
    x1, x2 = counts.anchor, counts.adversarial
    share_PLE = _per_token(x1, x1.hits_PLE) - _per_token(x2, x2.hits_PLE)
    mass_LE = (_per_token(x1, x1.mass_PLE) - _per_token(x2, x2.mass_PLE)).mean(0)
    a1_LE, a2_LE = x1.active(), x2.active()
    delta_LE = a1_LE / max(x1.tokens, 1) - a2_LE / max(x2.tokens, 1)
    agreement_LE = (np.sign(share_PLE) == np.sign(delta_LE)).mean(0)
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for i, layer in enumerate(counts.layers):
        n = counts.experts[i]
        parts = {
            "layer": [layer] * n,
            "expert": range(n),
            "a1": a1_LE[i, :n],
            "d1": x1.tokens - a1_LE[i, :n],
            "a2": a2_LE[i, :n],
            "d2": x2.tokens - a2_LE[i, :n],
            "delta": delta_LE[i, :n],
            "gate_mass": mass_LE[i, :n],
            "pair_delta": share_PLE[:, i, :n].mean(0),
            "pair_agreement": agreement_LE[i, :n],
            "score": -delta_LE[i, :n],
        }
        for name, values in parts.items():
            columns[name].extend(values)
    return pd.DataFrame(columns)


COLUMNS = (
    "layer", "expert", "a1", "d1", "a2", "d2", "delta", "gate_mass", "pair_delta", "pair_agreement", "score",
)  # fmt: skip


def _per_token(side: Side, sums_PLE: Any) -> Any:
    return sums_PLE / np.maximum(side.tokens_P, 1)[:, None, None]


def _rows(path: Path, needed: tuple[str, ...], optional: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(id, row) of a JSON Lines file; the id is the row's own, or its line number."""
    rows = []
    for number, row in read_json_lines(path):
        name = str(row.get("id", f"line {number}"))
        missing = [key for key in needed if key not in row]
        if missing:
            raise UserError(f"{path}: pair {name!r}: key {missing[0]!r} is missing; expected {', '.join(needed)}")
        foreign = [key for key in row if key not in (*needed, *optional)]
        if foreign:
            raise unknown(f"key of pair {name!r} in {path}", foreign[0], (*needed, *optional))
        rows.append((name, row))
    if not rows:
        raise UserError(f"{path}: holds no pairs; expected JSON Lines with {', '.join(needed)}")
    return rows


def _messages(path: Path, name: str, key: str, value: Any) -> Messages:
    usable = isinstance(value, list) and value
    if not usable or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise UserError(f"{path}: pair {name!r}: {key} must be a list of messages, each with 'role' and 'content'")
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in value]


def _spanned(chat: Chat, path: Path, name: str, x1: Messages, x2: Messages, span: str | None) -> Contrast:
    where = [f"{path}: pair {name!r}: {side}" for side in ("x1", "x2")]
    if span is None:
        sides = [_last_reply(chat, m, w) for m, w in zip((x1, x2), where, strict=True)]
    else:
        sides = [_span(chat, m, span, w) for m, w in zip((x1, x2), where, strict=True)]
    return Contrast(name, *sides)


def _span(chat: Chat, messages: Messages, span: str, where: str) -> ChatTurn:
    """Token ids up to the end of the span's last occurrence; a token that overlaps the span belongs to it."""
    tokenizer = chat.tokenizer
    if not tokenizer.is_fast:
        raise UserError(f"{where}: a span needs a fast tokenizer, which knows where its tokens lie in the text")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    start = text.rfind(span) if span.strip() else -1
    if start < 0:
        raise UserError(f"{where}: the span of {len(span)} characters is not found in the chat text")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [i for i, (low, high) in enumerate(encoded["offset_mapping"]) if low < start + len(span) and high > start]
    if not inside:
        raise UserError(f"{where}: no token lies in the span of {len(span)} characters")
    return ChatTurn(list(encoded["input_ids"][: inside[-1] + 1]), inside[0])


def _last_reply(chat: Chat, messages: Messages, where: str) -> ChatTurn:
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise UserError(f"{where}: without 'span' the last message must be the assistant's, after one of the user's")
    turns = tuple(Turn(cast(Speaker, message["role"]), message["content"]) for message in messages[:-1])
    return chat.encode(Conversation(turns), Reply.written(messages[-1]["content"]))
