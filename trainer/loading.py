"""Load a model and its tokenizer as a recipe names them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from data_prep.errors import UserError
from trainer.recipe import ModelSection

if not sys.stderr.isatty():
    logging.disable_progress_bar()  # off a terminal every redraw would be a line of the log


def load(section: ModelSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on this process's device, and its tokenizer.

    Raises:
        UserError: neither a folder nor a Hub id, or a tokenizer without a chat template.
        OSError: transformers' own message where files are missing or the Hub cannot be reached.
    """
    name = section.name_or_path
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(
            f"model.name_or_path: {name!r} is no folder here and no Hub id; allowed: a folder, or owner/name"
        )
    common = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **common)
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} has no chat template; use a chat-tuned checkpoint"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    # safetensors only: a pickled checkpoint can run code when it is read.
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **common)
    return model.to(PartialState().device).eval(), tokenizer
