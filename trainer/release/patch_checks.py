"""What a patch may say: every part of it is checked against an allow-list before anything is written.

A patch comes from others, and its seal proves only that it is whole. So it may fill tensors of its base inside its own
footprint, put them into weight files, and change the few keys of a configuration that say in which type they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from pydantic import ValidationError
from torch import Tensor

from data_prep.errors import UserError
from trainer.model.weight_files import SINGLE, CheckpointFiles
from trainer.recipe.errors import shown

if TYPE_CHECKING:
    from trainer.release.patch import About, Touched

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""Types that a base's tensor may be cast to."""

CONFIGS = ("config.json", "generation_config.json")
"""Files that say how weights are to be used: taken from the export. All other files are the base's."""

MAY_DIFFER = ("dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration that a patch may change, wherever they stand in it."""

MAX_DEPTH = 32
"""Of nested lists and objects in a JSON file of a patch."""

_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_VERSION = re.compile(r"[A-Za-z0-9.+_-]{1,40}")


def read_json(text: str, where: str) -> Any:
    """JSON of finite numbers, encodable text and bounded depth; `UserError`, which begins with `where`, for others."""

    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{where}: found the number {constant}, allowed: finite numbers")

    try:
        found = json.loads(text, parse_constant=refuse)
        text.encode()
        depth = _depth(found)
    except UserError:
        raise
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:  # also integers of thousands of digits
        raise UserError(f"{where}: damaged or truncated: {error}") from error
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested too deeply; allowed: {MAX_DEPTH} levels")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds text that is not Unicode: {error}") from error
    return found


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [part for item in inner for part in item]
    return depth


def first_problem(error: ValidationError) -> str:
    """Key, what was found and what is allowed, of the first key of another type than a patch has."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    return f"{key}: found {shown(first['input'])}, allowed: {first['msg'].removeprefix('Input should be ')}"


# --- without the base -----------------------------------------------------------------------------


def check_alone(about: About, path: Path) -> None:
    """What can be told from `patch.json` itself.

    Raises:
        UserError: names the key of `path`, what was found and what is allowed.
    """
    hashes = {"untouched": about.untouched, "patch_sha256": about.patch_sha256}
    for name, touched in about.tensors.items():
        hashes |= {f"tensors.{name}.before": touched.before, f"tensors.{name}.after": touched.after}
        _check_rows(path, f"tensors.{name}.rows", touched.rows)
    for key, value in hashes.items():
        if not _HASH.fullmatch(value):
            raise UserError(f"{path}: {key}: found {shown(value)}, allowed: a hex sha256")
    for name, rows in (about.footprint or {}).items():
        _check_rows(path, f"footprint.{name}", rows)
    for name, dtype in about.cast.items():
        if dtype not in FLOATS:
            raise UserError(f"{path}: cast.{name}: found {shown(dtype)}, allowed: {', '.join(FLOATS)}")
    if about.base.revision is not None and (
        not _REVISION.fullmatch(about.base.revision) or ".." in about.base.revision
    ):
        found = shown(about.base.revision)
        raise UserError(f"{path}: base.revision: found {found}, allowed: a branch, tag or commit of the Hub, or null")
    for name in about.configs:
        if name not in CONFIGS:
            raise UserError(f"{path}: configs: names the file {name!r}; allowed: {', '.join(CONFIGS)}")
    _check_files(about, path)
    outside = _outside_footprint(about)
    if outside is not None:
        raise UserError(f"{path}: touches {outside}, which its own footprint leaves out")


def _check_rows(path: Path, key: str, rows: Sequence[int] | None) -> None:
    if rows is None:
        return
    rising = all(a < b for a, b in pairwise(rows))
    if not rows or not rising or rows[0] < 0 or rows[-1] >= 2**63:
        allowed = "row numbers from 0, each larger than the one before, or null for all rows"
        raise UserError(f"{path}: {key}: found {shown(list(rows[:8]))}, allowed: {allowed}")


def _check_files(about: About, path: Path) -> None:
    """The weight files hold every touched tensor, no tensor twice, and load as a checkpoint."""
    for file, layout in about.files.items():
        if not _FILE.fullmatch(file):
            raise UserError(f"{path}: files: names the file {file!r}; allowed: *.safetensors, without a folder")
        if not layout.tensors:
            raise UserError(f"{path}: files.{file}.tensors: found an empty list, allowed: names of tensors")
    found = shown(list(about.files)[:3])
    if about.index_metadata is None and list(about.files) != [SINGLE]:
        raise UserError(f"{path}: files: found {found}, allowed without index_metadata: {SINGLE}")
    if about.index_metadata is not None and (not about.files or SINGLE in about.files):
        # Beside an index it would be loaded instead of what the index names.
        raise UserError(f"{path}: files: found {found}, allowed with index_metadata: other names than {SINGLE}")
    count = Counter(name for layout in about.files.values() for name in layout.tensors)
    twice = next((name for name, times in count.items() if times > 1), None)
    if twice is not None:
        raise UserError(f"{path}: files: tensor {twice!r} is named {count[twice]} times; allowed: once")
    for key in ("tensors", "cast", "footprint"):
        absent = sorted((getattr(about, key) or {}).keys() - count.keys())
        if absent:
            raise UserError(f"{path}: {key}: tensor {absent[0]!r} is in none of the files; allowed: a tensor of files")


def _outside_footprint(about: About) -> str | None:
    """The first tensor or row that a patch touches and must not; format 1 allowed everything."""
    if about.footprint is None and about.format == "routealign-patch-1":
        return None
    footprint = about.footprint or {}
    for name, touched in about.tensors.items():
        if name not in footprint:
            return f"tensor {name!r}"
        allowed = footprint[name]
        if allowed is not None and touched.rows is None:
            return f"all of tensor {name!r}"
        if allowed is not None and touched.rows is not None and not set(touched.rows) <= set(allowed):
            return f"row {min(set(touched.rows) - set(allowed))} of tensor {name!r}"
    return None


# --- with the base --------------------------------------------------------------------------------


def check_covers(about: About, path: Path, base: CheckpointFiles) -> None:
    """`UserError` unless the patch's weight files hold the tensors of the base, every one and no other."""
    covered = {name for layout in about.files.values() for name in layout.tensors}
    missing = sorted(covered - base.file_of.keys())
    if missing:
        raise UserError(f"{base.folder}: not the base of this patch ({about.base.name}): no tensor {missing[0]!r}")
    left_out = sorted(base.file_of.keys() - covered)
    if left_out:
        raise UserError(
            f"{path}: files: leaves out tensor {left_out[0]!r} of the base {base.folder}; allowed: every tensor once"
        )


def check_tensor(about: About, path: Path, name: str, old: Tensor, stored: Tensor) -> None:
    """`UserError` unless what the patch holds of a tensor fits the base's in type, shape and rows."""
    touched: Touched = about.tensors[name]
    dtype = cast(about, path, name, old).dtype
    if stored.dtype != dtype:
        raise UserError(
            f"{path.parent}: tensor {name!r} is stored as {stored.dtype}, allowed: {dtype}, as in the base"
        )
    check_within(about, path, name, old)
    shape = list(old.shape) if touched.rows is None else [len(touched.rows), *old.shape[1:]]
    if list(stored.shape) != shape:
        raise UserError(f"{path.parent}: tensor {name!r} is stored as {list(stored.shape)}, allowed: {shape}")


def cast(about: About, path: Path, name: str, old: Tensor) -> Tensor:
    """The base's tensor in the type that the patch casts it to; `UserError` where that is not for its numbers."""
    if name not in about.cast:
        return old
    if not old.is_floating_point():
        raise UserError(f"{path}: cast.{name}: found in the base {old.dtype}, allowed: {', '.join(FLOATS)}")
    return old.to(FLOATS[about.cast[name]])


def check_within(about: About, path: Path, name: str, old: Tensor) -> None:
    """`UserError` where rows that are named of a tensor are beyond it."""
    named = {f"footprint.{name}": (about.footprint or {}).get(name)}
    if name in about.tensors:
        named[f"tensors.{name}.rows"] = about.tensors[name].rows
    for key, rows in named.items():
        if rows is not None and (old.ndim == 0 or rows[-1] >= len(old)):
            allowed = f"0 to {len(old) - 1}" if old.ndim else "null, of a tensor without rows"
            raise UserError(f"{path}: {key}: found row {rows[-1]}, allowed: {allowed}")


def check_configs(configs: Mapping[str, str], where: str, base: Path) -> None:
    """`UserError`, which begins with `where`, unless configurations are the base's but for keys of `MAY_DIFFER`."""
    for name, text in configs.items():
        own = _own(base / name)
        if text == own:
            continue
        new = _object(text, f"{where}: {name}")
        for key in _differing(_object(own, f"{base / name}"), new):
            if key[-1] not in MAY_DIFFER:
                raise UserError(
                    f"{where}: {name}: {'.'.join(key)} differs from the base's; allowed to differ: "
                    f"{', '.join(MAY_DIFFER)}"
                )
            value, types = _at(new, key), "dtype" in key[-1]
            if not isinstance(value, str) or not (value in FLOATS if types else _VERSION.fullmatch(value)):
                allowed = ", ".join(FLOATS) if types else "a version"
                raise UserError(f"{where}: {name}: {'.'.join(key)}: found {shown(value)}, allowed: {allowed}")


def _own(path: Path) -> str:
    if not path.is_file() and path.name == CONFIGS[0]:
        raise UserError(f"{path}: not found; allowed as a base: the folder of a model")
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else "{}"
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    found = read_json(text, where)
    if not isinstance(found, dict):
        raise UserError(f"{where}: found a {type(found).__name__}, allowed: an object")
    return found


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Keys whose values differ or that only one side has, nested ones as paths."""
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, (*at, key))
        elif key not in old or key not in new or json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            yield (*at, key)


def _at(tree: Mapping[str, Any], key: Sequence[str]) -> Any:
    found: Any = tree
    for part in key:
        found = found.get(part) if isinstance(found, dict) else None
    return found
