"""The Jinja templates beside this file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(name: str, *, escape: bool, **filters: Callable[..., str]) -> Template:
    """A template by its file name. `escape`: HTML; of Markdown the filters take care."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escape,
        autoescape=escape,
    )
    environment.filters |= filters
    return environment.get_template(name)
