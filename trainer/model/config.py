"""A checkpoint's configuration, read and checked before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from data_prep.errors import UserError
from trainer.model.source import is_folder, not_to_be_had
from trainer.recipe.errors import shown

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts")
"""Keys of the number of experts and of top-k; transformers maps what a family calls them otherwise to one of these."""

SIZES = {
    "num_hidden_layers": 4096,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", *EXPERTS, *TOP_K), 65_536),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"), 2**24),
}
"""Key -> its largest sensible value: torch fails on a larger one in many lines, or is busy with it for ever."""


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or Hub id.

    Raises:
        UserError: one that no model can be built from, which says what key of `config.json` is wrong; one that is not
            to be had from the Hub, or not there.
    """
    try:
        _check_types(name, PreTrainedConfig.get_config_dict(name, revision=revision)[0])
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, HFValidationError) as error:
        if is_folder(name):
            raise UserError(f"{name}: config.json: {' '.join(str(error).split())}") from error
        raise not_to_be_had(str(name), error) from error
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"{name}: config.json: {' '.join(str(error).split()) or type(error).__name__}") from error
    _check_sizes(name, config)
    return config


def _check_types(name: str | Path, tree: Any) -> None:
    """transformers takes any attribute of torch for a type of numbers."""
    parts = [tree, *tree.values()] if isinstance(tree, dict) else []
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            found = part.get(key) if isinstance(part, dict) else None
            if isinstance(found, str) and found != "auto" and not _is_type(found.removeprefix("torch.")):
                allowed = "bfloat16, float16, float32"
                raise UserError(f"{name}: config.json: {key}: found {shown(found)}; allowed: {allowed}")


def _is_type(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def check_generation(folder: Path) -> None:
    """`UserError` unless `generation_config.json`, where there is one, is an object and its tokens are numbers."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, expected an object")
    for key in TOKENS:
        value = found.get(key)
        if value is not None and _numbers(value) is None:
            raise UserError(f"{path}: {key}: found {shown(value)}, expected a token's number or a list of them")


def cannot_be_built(config: PreTrainedConfig, error: Exception) -> UserError:
    """The error for a configuration of which transformers makes no model, whatever it stumbled on. Not raised here."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    name = config.name_or_path or config.model_type
    return UserError(
        f"{name}: config.json: no model can be built from it: {type(error).__name__}: {said[:300]}; allowed: the "
        f"configuration of a {config.model_type} model"
    )


def _check_sizes(name: str | Path, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    given = {key: getattr(text, key, None) for key in SIZES}
    found = {key: _numbers(value) for key, value in given.items() if value is not None}
    for key, numbers in found.items():
        if numbers is None and key not in (*EXPERTS, *TOP_K):
            continue  # transformers knows what else this family allows
        if numbers is None or not 1 <= min(numbers, default=0) <= max(numbers) <= SIZES[key]:
            allowed = f"an integer from 1 to {SIZES[key]:,}"
            raise UserError(f"{name}: config.json: {key}: found {shown(given[key])}; allowed: {allowed}")
    experts = next((min(found[key] or []) for key in EXPERTS if key in found), None)
    for key in TOP_K:
        if experts is not None and max(found.get(key) or [0]) > experts:
            raise UserError(
                f"{name}: config.json: {key}: found {given[key]!r}; allowed: 1 to {experts}, the number of experts"
            )


def _numbers(value: Any) -> list[int] | None:
    """The value, or its values layer by layer; None where one is no integer."""
    values = value if isinstance(value, list) else [value]
    return values if all(type(one) is int for one in values) else None
