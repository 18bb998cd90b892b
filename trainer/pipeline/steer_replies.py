"""Replies of a steered model to given prompts: what `routealign steer` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.loaders import Source, load
from data_prep.schema import Conversation
from trainer.evaluation.generation import reply
from trainer.model import load as loading
from trainer.model.chat import Chat
from trainer.moe.backbone import Backbone
from trainer.moe.steering import steer
from trainer.moe.steering_file import read
from trainer.recipe.sections import ModelSection

BATCH = 16


def steered_replies(
    model: str, experts: Path, prompts: Sequence[str], strength: float | None, max_new_tokens: int
) -> list[str]:
    """Greedy replies under the steering (and the gate) of a `steering.json`, or with an expert set deactivated.

    `strength` replaces the file's.

    Raises:
        ValueError: a file that is not there or of another model, contradictory or impossible sets, a strength outside
            [0, 1], no room for so many tokens, an empty prompt.
    """
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--strength: found {strength}; allowed: 0 (untouched) to 1 (forced)")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt: found an empty text; allowed: what the model is to be asked")
    section = ModelSection(name_or_path=model)
    loaded, tokenizer = loading.load(section)
    chat = Chat.of(loaded, tokenizer, section)
    backbone = Backbone.of(loaded).check()
    file = read(experts, backbone, model)
    how = file.steering if strength is None else replace(file.steering, strength=strength)
    with steer(backbone, how, file.gate):
        replies = reply(
            loaded,
            chat,
            [Conversation.of(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=BATCH,
            label="steered replies",
            key="--max-new-tokens",
        )
    return [found.text for found in replies]


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file: a text file's lines, or a table's prompt column (csv, json, jsonl, parquet).

    Args:
        path: None: the lines of standard input.

    Raises:
        UserError: no prompt in it, or a file that cannot be read.
    """
    if path is None:
        lines = [line.strip() for line in sys.stdin if line.strip()]
        if not lines:
            raise UserError("no prompt given; expected one a line on standard input, or --prompts FILE")
        return lines
    if path.suffix != ".txt":
        return [row.text for row in load("records", Source(str(path), "benign"))]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {path}: cannot be read as a text file: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; expected one a line")
    return prompts
