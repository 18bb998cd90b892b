"""A checkpoint's tokenizer and its chat template, tried out before anything is asked of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.errors import UserError
from trainer.model.config import read_config
from trainer.model.source import check_source, not_to_be_had
from trainer.recipe.sections import ModelSection
from trainer.runtime.signals import time_limit

SECONDS = 10.0
"""How long a chat template may take for a few words: far longer than any does, unless it never ends."""
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""A template is a program of the checkpoint's: what it raises is the checkpoint's message."""
ASKED = ("How do I brew tea?", "Which moss grows on stones?")
ANSWERED = "With warm water."


def read_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint whose weights may be read, its chat template tried.

    Raises:
        UserError: as `check_source` and `read_config`; a tokenizer that cannot be read, or without a chat template
            that says what is asked and answered.
    """
    name = section.name_or_path
    check_source(name, section.revision)
    read_config(name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    tokenizer = load_tokenizer(name, section.revision, trust_remote_code=section.trust_remote_code)
    check_template(tokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer as its files say. `UserError` where they are missing or cannot be understood."""
    try:
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        if not Path(name).is_dir():
            raise not_to_be_had(name, error) from error
        raise _unreadable(name, error) from error
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, TemplateError) as error:
        # Whatever transformers' code stumbles on: the files hold something that it does not expect.
        raise _unreadable(name, error) from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own
            raise
        raise _unreadable(name, error) from error
    return made


def _unreadable(name: str, error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"model.name_or_path: the tokenizer of {name!r} cannot be read (tokenizer.json, tokenizer_config.json and the "
        f"files beside them): {type(error).__name__}: {said[:300]}"
    )


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Render the chat template for two prompts, each alone and answered.

    Raises:
        UserError: there is none, it fails, it never ends, or it leaves out what is asked or answered.
    """
    whose = f"model.name_or_path: the chat template of {name!r}"
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} has no chat template; use a chat-tuned checkpoint"
        )
    never = f"{whose} did not end within {SECONDS:.0f} s for a prompt of five words; allowed: one that ends"
    try:
        with time_limit(SECONDS, UserError(never)):
            first, second = (_rendered(tokenizer, text) for text in ASKED)
            answered = _rendered(tokenizer, ASKED[0], ANSWERED)
    except UserError:
        raise
    except TEMPLATE_ERRORS as error:
        raise _fails(whose, error) from error
    if first == second:
        raise UserError(f"{whose} leaves out what is asked: two prompts come out the same; allowed: one that shows it")
    if answered == first:
        raise UserError(f"{whose} leaves out what is answered; allowed: one that shows the assistant's turn")


def _rendered(tokenizer: PreTrainedTokenizerBase, asked: str, answered: str | None = None) -> str:
    turns: list[dict[str, Any]] = [{"role": "user", "content": asked}]
    if answered is not None:
        turns.append({"role": "assistant", "content": answered})
    text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=answered is None, tokenize=False)
    return text


def _fails(whose: str, error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{whose} cannot be rendered for a user's and an assistant's turn: {type(error).__name__}: {said}"
    )
