"""Replies that were asked to be kept: a local file that its owner alone may read, and that is never pushed.

A second judge can grade the same replies (`judge_again.py`). They may hold what a model answered to harmful requests,
so no step records them and nothing else reads them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from data_prep.errors import UserError
from data_prep.json_lines import read_json_lines
from data_prep.schema import Conversation, Turn
from trainer.evaluation.suite import JudgedReply, Keep
from trainer.model.reply import Reply
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import replacing

FOLDER = "replies"
"""In the run folder; a file for every measurement."""


@dataclass(frozen=True)
class KeptReply:
    """One judged reply with what was asked."""

    row: JudgedReply
    asked: Conversation
    reply: Reply


def keep_in(run: Path) -> Keep:
    """Keeps the replies of every measurement in a run folder, each in a file of its own."""
    return lambda label, *kept: _write(_file(run, label), *kept)


def keep_as(path: Path) -> Keep:
    """Keeps the replies of one measurement in this file."""
    return lambda label, *kept: _write(path, *kept)


def say_what_is_missing(run: Path, label: str) -> None:
    """A measurement that was made before is not made again for its replies."""
    if not _file(run, label).exists():
        say(f"replies: {label} was measured before without keeping them; --force measures it again")


@contextmanager
def private(path: Path) -> Iterator[TextIO]:
    """A text file to write that only its owner may read; it takes the place of `path` as a whole."""
    before_anything_is_written = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with (
        replacing(path) as temporary,
        os.fdopen(os.open(temporary, before_anything_is_written, 0o600), "w", encoding="utf-8") as file,
    ):
        yield file


def measurements(run: Path) -> dict[str, Path]:
    """Label -> file of the replies that a run kept. Raises `UserError` where it kept none."""
    found = {path.stem: path for path in sorted((run / FOLDER).glob("*.jsonl"))}
    if not found:
        raise UserError(f"{run}: no replies were kept; allowed: a run that was made with --keep-replies")
    return found


def read_replies(path: Path) -> list[KeptReply]:
    """The replies of a file. Raises `UserError` that names file and line, and quotes nothing."""
    return [_kept(row, f"{path}, line {number}") for number, row in read_json_lines(path)]


def _file(run: Path, label: str) -> Path:
    return run / FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}.jsonl"


def _write(path: Path, rows: Sequence[JudgedReply], prompts: Sequence[Conversation], replies: Sequence[Reply]) -> None:
    if not is_main_process():
        return
    with private(path) as file:
        for row, asked, reply in zip(rows, prompts, replies, strict=True):
            file.write(json.dumps(_record(row, asked, reply), ensure_ascii=False) + "\n")
    say(f"replies: {len(rows)} kept in {path}, for this user alone")


def _record(row: JudgedReply, asked: Conversation, reply: Reply) -> dict[str, Any]:
    return asdict(row) | {"messages": asked.messages(), "opening": asked.opening, "reply": reply.text}


def _kept(record: dict[str, Any], where: str) -> KeptReply:
    try:
        turns = tuple(Turn(message["role"], message["content"]) for message in record.pop("messages"))
        asked = Conversation(turns, record.pop("opening"))
        text = record.pop("reply")
        row = JudgedReply(**record)
    except (KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{where}: no reply as --keep-replies writes it") from error
    return KeptReply(row, asked, Reply(text, None, row.finished is not False))
