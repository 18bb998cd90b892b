"""Jinja templates, which lie beside the module that fills them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(path: Path, *, escape: bool, **filters: Callable[..., str]) -> Template:
    """The template in a file. `escape`: HTML; of Markdown the filters take care."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escape,
        autoescape=escape,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
