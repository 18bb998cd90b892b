"""Safetensors files of the head and of what it is fitted on: written whole, read with what they were made for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError
from trainer.runtime.files import replacing, tensor_errors_as_oserror, write_tensors


def write(path: Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Tensors, and facts as JSON texts in the header. `kind`: a name with a version. `OSError` names the file."""
    metadata = {"format": kind} | {key: json.dumps(value) for key, value in facts.items()}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary, tensor_errors_as_oserror(path):
        write_tensors(temporary, held, metadata)


def read(path: Path, kind: str, keys: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote: tensors on the CPU, and the facts under `keys`.

    Raises:
        UserError: missing, damaged, or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected a file of format {kind}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error
    found = metadata.get("format")
    if found != kind:
        raise UserError(f"{path}: format: found {found!r}; allowed: {kind!r}")
    try:
        return tensors, {key: json.loads(metadata[key]) for key in keys}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: header: {type(error).__name__}: {error}; expected {', '.join(keys)}") from error


def same_origin(path: Path, what: str, found: dict[str, str], expected: dict[str, str]) -> None:
    """Refuse what was made from another base or other adapters. `what`: "head".

    Raises:
        UserError: names the first of the facts that differs.
    """
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"{path}: {what} of another base or other adapters: {key}: found {found.get(key)!r}; "
                f"allowed: {expected.get(key)!r}"
            )
