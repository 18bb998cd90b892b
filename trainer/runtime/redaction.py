"""What may leave this machine: no path of its own, no token."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_REMOVED = "[token removed]"


def is_local(name: str) -> bool:
    """Whether a name in a recipe is a path: it exists here, or it cannot be a Hub id."""
    return os.path.exists(name) or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def without_path(name: str) -> str:
    """A Hub id as it is; of a path on this machine its last part."""
    return (Path(name).name or Path(name).resolve().name) if is_local(name) else name


def without_paths(value: Any) -> Any:
    """Nested lists and mappings with every text without its path."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return without_path(value) if isinstance(value, str) else value


def without_tokens(text: str) -> str:
    """The text with access tokens of the Hub taken out: the one in use, and whatever looks like one."""
    in_use = get_token()
    return _TOKEN.sub(_REMOVED, text.replace(in_use, _REMOVED) if in_use else text)
