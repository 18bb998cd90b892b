"""Where a model is said to be: a folder or a Hub id, with weights that may be read."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file

from data_prep.errors import UserError


def check_source(name: str, revision: str | None = None) -> None:
    """Refuse what no model can be read from.

    Raises:
        UserError: neither a folder nor a Hub id; a file; pickled weights, which can run code when they are read; a
            repository that cannot be had from the Hub.
    """
    path = Path(name)
    if os.path.isfile(path):
        raise UserError(f"model.name_or_path: {name!r} is a file; allowed: a model's folder, or a Hub id owner/name")
    if is_folder(name):
        if revision is not None:
            raise UserError(f"model.revision: found {revision!r} with the local folder {name}; allowed: with a Hub id")
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path: {name!r} holds no config.json; allowed: a folder with a model")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"model.name_or_path: {name!r} is no folder here and no Hub id; allowed: a folder, or owner/name"
        )
    elif revision is not None and not revision.strip():
        raise UserError("model.revision: found an empty text; allowed: a branch, tag or commit, or null")
    try:
        safe = any(has_file(name, file, revision) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        pickled = [file for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if not safe and has_file(name, file, revision)]
    except (OSError, ValueError) as error:
        raise not_to_be_had(name, error) from error
    if pickled:
        raise UserError(
            f"model.name_or_path: {name!r} holds {pickled[0]} and no {SAFE_WEIGHTS_NAME}; pickled weights are not "
            "read, because reading one can run code; convert it to safetensors first"
        )


def is_folder(name: str | Path) -> bool:
    """Whether it is one here; pathlib raises where a name is too long for any."""
    return os.path.isdir(name)


def not_to_be_had(name: str, error: Exception) -> UserError:
    """The error for a model that the Hub does not give, with the first line of what was said. Returned, not raised."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"model.name_or_path: {name!r} is no folder here and is not to be had from the Hub ({said}); allowed: a "
        "folder, or a Hub id that is cached or can be reached"
    )
