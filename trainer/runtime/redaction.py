"""What may leave this machine: no path of its own, no password, key or token."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

_REMOVED = "[secret removed]"

# What the services themselves put at the beginning of their keys, so that they are found wherever they stand.
_KEY = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{8,}
    | \bapi_org_[A-Za-z0-9]{16,}
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}
    | \bglpat-[\w-]{16,}
    | \bsk-[A-Za-z0-9_-]{20,} | \b[rsp]k_(?:live|test)_[A-Za-z0-9]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \bAIza[\w-]{30,} | \bya29\.[\w-]{20,}
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,}
    | \bnpm_[A-Za-z0-9]{30,} | \bpypi-[\w-]{40,} | \bwandb_v1_\w{20,} | \bdapi[0-9a-f]{32}\b
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----(?:.|\n)*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    """,
    re.VERBOSE,
)
# The secret part of an address, a header or an assignment: the one group.
_GIVEN = re.compile(
    r"""
      ://[^\s/:@"']*:(?P<password>[^\s/@"']+)@
    | \b(?:Bearer|Basic)[ ]+(?P<header>[A-Za-z0-9+/._~=-]{8,})
    | [?&](?:[\w-]*(?:token|secret|password|signature|credential|api_?key)|sig|key|auth)=(?P<query>[^&\s"'#]+)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAMES_SECRET = re.compile(
    r"^token$|(?:^|_)(?:secret|password|passwd|passphrase|credentials?|apikey|(?:api|access|secret|private|account)_key"
    r"|(?:access|api|auth|bearer|hf|hub|id|refresh|session|secret|github|wandb)_token|authorization)$"
)
_SHORTEST = 8
"""Characters of the shortest text that is taken out wherever it stands: a shorter one may be a word."""


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


def without_secrets(text: str) -> str:
    """The text without what looks like a password, key or token of any service, and without those in use here."""
    for value in _in_use():
        text = text.replace(value, _REMOVED)
    return _GIVEN.sub(_without_group, _KEY.sub(_REMOVED, text))


def without_secret_values(value: Any) -> Any:
    """Nested lists and mappings without secrets: those that look like one, and texts whose key says that they are."""
    if isinstance(value, dict):
        return {key: _under(key, part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_secret_values(part) for part in value]
    return without_secrets(value) if isinstance(value, str) else value


def _under(key: str, value: Any) -> Any:
    words = re.sub(r"[-.\s]|(?<=[a-z])(?=[A-Z])", "_", key).lower()
    named = _NAMES_SECRET.search(words)
    return _REMOVED if named and isinstance(value, str) and value else without_secret_values(value)


def _without_group(found: re.Match[str]) -> str:
    name = found.lastgroup
    assert name is not None, "every alternative has one group"
    start, end = found.start(name) - found.start(), found.end(name) - found.start()
    return found.group()[:start] + _REMOVED + found.group()[end:]


def _in_use() -> Iterator[str]:
    """The Hub's token, and every value of the environment whose name says that it is secret; longest first."""
    values = {value for name, value in os.environ.items() if _NAMES_SECRET.search(name.lower())}
    values |= {get_token() or ""}
    yield from sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
