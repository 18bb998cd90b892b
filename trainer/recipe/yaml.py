"""YAML in and out for recipes: scientific numbers, no double keys, `section.key=value` overrides."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError
from trainer.recipe.tree import plain_tree

# YAML 1.1, which PyYAML reads, wants a dot and a signed exponent: `5e-5` would be text.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.[\d_]+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # `<<` merges another mapping and may come more than once.
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


MAX_BYTES = 10_000_000
"""Of a recipe file."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. `UserError` names file and line; `OSError` where the file cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, expected a recipe file (YAML)")
    try:
        with path.open("rb") as file:  # bounded: a device has no end
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected a recipe file (YAML)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r}: names no file ({error}); expected a recipe file (YAML)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a recipe file (YAML)") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: found more than {MAX_BYTES:,} bytes; expected a recipe file (YAML)")
    tree = _plain(_parse(text, str(path)), str(path))
    if tree is None:
        raise UserError(f"{path}: the file is empty; expected the sections run, model, data, ...")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found a {type(tree).__name__}, expected sections: run, model, data, ...")
    return tree


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to an equal mapping."""
    # Escaped, not raw: PyYAML writes U+0085 raw and reads it back as a space.
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=119)
    return text


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Put each `section.key=value` into `tree`, in place; the value is read as YAML. Returns the keys that were set.

    A number in the key picks an item of a list (`data.sources.0.path=x`). `UserError` where there is no `=`, where the
    value is not YAML, or where the key leads through something that holds no keys.
    """
    keys = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        key = tuple(dotted.split("."))
        if not equals or not all(key):
            raise UserError(f"override '{override}': expected section.key=value")
        value = _plain(_parse(text, f"override '{_short(override)}'"), "override", key)
        _put(tree, key, value, override)
        keys.append(key)
    return keys


def _put(tree: dict[str, Any], key: tuple[str, ...], value: Any, override: str) -> None:
    at: Any = tree
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        slot: str | int = part
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                where = ".".join(key[:depth])
                raise UserError(
                    f"override '{override}': {where} is a list; expected 0 to {len(at) - 1}, found '{part}'"
                )
            slot = int(part)
        elif not isinstance(at, dict):
            where = ".".join(key[:depth])
            raise UserError(f"override '{override}': {where} is {at!r} and holds no keys; override {where} as a whole")
        if last:
            at[slot] = value
        elif isinstance(at, dict) and at.get(slot) is None:
            # A section that the file leaves out, or leaves empty.
            at[slot] = at = {}
        else:
            at = at[slot]


def _short(override: str) -> str:
    return override if len(override) <= 80 else f"{override[:77]}..."


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{source}: {where}not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{source}: nested too deeply, expected a recipe") from None
    except (ValueError, OverflowError) as error:
        # PyYAML resolves `2024-13-45` to a date before it finds out that there is none.
        raise UserError(f"{source}: not YAML: {error}") from error


def _plain(value: Any, source: str, key: tuple[str, ...] = ()) -> Any:
    try:
        return plain_tree(value, key)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
