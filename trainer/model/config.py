"""A checkpoint's configuration, read and checked before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from data_prep.errors import UserError
from trainer.model.source import not_to_be_had

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts")
"""Keys of the number of experts and of top-k; transformers maps what a family calls them otherwise to one of these."""


def read_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or Hub id.

    Raises:
        UserError: one that no model can be built from, which says what key of `config.json` is wrong; one that is not
            to be had from the Hub.
        OSError: transformers' own message where a folder holds none.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise not_to_be_had(str(name), error) from error
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"{name}: config.json: {' '.join(str(error).split()) or type(error).__name__}") from error
    _check_experts(name, config)
    return config


def _check_experts(name: str | Path, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    given = {key: getattr(text, key, None) for key in (*EXPERTS, *TOP_K)}
    found = {key: _numbers(value) for key, value in given.items() if value is not None}
    for key, numbers in found.items():
        if numbers is None or min(numbers, default=0) < 1:
            raise UserError(f"{name}: config.json: {key}: found {given[key]!r}; allowed: an integer, 1 or more")
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
