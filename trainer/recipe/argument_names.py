"""Names of a trainer's arguments, read from its source: importing the library to check a name takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SOURCES = {
    "TrainingArguments": ("transformers/training_args.py",),
    "SFTConfig": ("transformers/training_args.py", "trl/trainer/base_config.py", "trl/trainer/sft_config.py"),
}
"""Class -> the files of its fields; a test compares with the classes themselves."""
NOT_TAKEN = frozenset({"local_rank"})
"""Set by launchers alone."""


@cache
def argument_names(arguments_class: str) -> frozenset[str]:
    """Fields that the constructor of `TrainingArguments` or `SFTConfig` takes."""
    found = {name for file in SOURCES[arguments_class] for name in _fields(file)}
    return frozenset(found - NOT_TAKEN)


def _fields(file: str) -> Iterator[str]:
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / inside).read_text(encoding="utf-8"))
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            for line in owner.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_taken(line):
                    yield line.target.id


def _is_taken(field: ast.AnnAssign) -> bool:
    """Whether a dataclass takes the field: no `field(init=False)`, no `ClassVar`."""
    if "ClassVar" in ast.unparse(field.annotation):
        return False
    keywords = field.value.keywords if isinstance(field.value, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and not k.value.value for k in keywords)
