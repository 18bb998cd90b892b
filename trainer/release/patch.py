"""A repaired model as a patch of its base: only what differs, with hashes, applied bit for bit.

A patch is two files. `patch.safetensors` holds the tensors that differ, under their names in the checkpoint's files;
of a tensor that differs in a few places of its first dimension (experts fused in one tensor) only those rows.
`patch.json` holds everything else: which base, what may be touched, what was with its hash before and after, how the
checkpoint is cut into files, and what made it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import AutoConfig

from data_prep.errors import UserError
from trainer.model.load import skeleton
from trainer.model.weight_files import INDEX, CheckpointFiles, bits, digest, local_folder
from trainer.moe.expert_set import ExpertSet
from trainer.moe.footprint import Footprint
from trainer.recipe.errors import shown
from trainer.release import patch_checks
from trainer.release.new_folder import check_new, new_folder
from trainer.release.patch_checks import CONFIGS
from trainer.release.places import Places, changed_rows
from trainer.release.rewrite import copy_other_files, write_like
from trainer.runtime.files import (
    atomic_write,
    save_tensors,
    sha256,
    sha256_text,
    tensor_errors_as_oserror,
    write_tensors,
)
from trainer.runtime.hub_client import answers_understood
from trainer.runtime.redaction import without_path

Format = Literal["routealign-patch-2", "routealign-patch-1"]
"""What this release reads; the first is what it writes. Format 1 does not say what may be touched."""

TENSORS, ABOUT = "patch.safetensors", "patch.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Base(_Strict):
    """The checkpoint that a patch is for; a local folder goes by its name alone."""

    name: str
    revision: str | None


class Touched(_Strict):
    """Hashes of a whole tensor; `rows` of its first dimension are in the patch, or all of it."""

    before: str
    after: str
    rows: list[int] | None = None


class File(_Strict):
    """One weight file of the checkpoint."""

    metadata: dict[str, str] | None
    tensors: list[str]


class About(_Strict):
    """`patch.json`. `untouched` is one hash over all other tensors, `cast` the type a base's tensor is cast to.

    `footprint`: what may be touched, name of a tensor in the files -> rows of its first dimension, or all of it.
    """

    format: Format = "routealign-patch-2"
    base: Base
    dtypes: list[str]
    footprint: dict[str, list[int] | None] | None = None
    tensors: dict[str, Touched]
    untouched: str
    cast: dict[str, str]
    files: dict[str, File]
    index_metadata: dict[str, Any] | None
    configs: dict[str, str]
    expert_set: dict[str, Any] | None
    recipe_hash: str
    versions: dict[str, str]
    patch_sha256: str

    def sealed(self) -> str:
        """As JSON with a hash over its own content."""
        content = self.model_dump()
        return json.dumps(content | {"sha256": _seal(content)}, indent=1)


def _seal(content: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(content, sort_keys=True))


class _Untouched:
    """One hash over tensors in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self._lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}")

    def hash(self) -> str:
        return sha256_text("\n".join(sorted(self._lines)))


# --- write ----------------------------------------------------------------------------------------


def write_patch(
    base: Path,
    exported: Path,
    out: Path,
    *,
    base_name: str,
    revision: str | None,
    footprint: Footprint,
    expert_set: ExpertSet | None,
    recipe_hash: str,
    versions: dict[str, str],
) -> About:
    """Write `patch.safetensors` and `patch.json` of an exported checkpoint into `out`.

    One pair of tensors is in memory at a time, besides the changed rows of fused tensors.

    Args:
        base_name: Hub id or folder, as the recipe names it; of a folder only its name is kept.
        revision: the Hub revision, None for a folder.
        footprint: what was allowed to move, by the names of the stock model.
        expert_set: the experts that were edited, where the method has a set: a description, nothing is made of it.

    Raises:
        UserError: the base's files hold other tensors than the export's (the base is in an older or quantised format),
            or the export's configuration says other than the base's what the model is.
        RuntimeError: something outside the footprint moved, which an audit would have said. Nothing is written.
        OSError: disk full or not writable; a patch written before stays as it was.
    """
    tensors: dict[str, Tensor] = {}
    touched: dict[str, Touched] = {}
    cast: dict[str, str] = {}
    dtypes: set[str] = set()
    untouched = _Untouched()
    with CheckpointFiles(base) as before, CheckpointFiles(exported) as after:
        unknown = sorted(after.file_of.keys() - before.file_of.keys())
        if unknown:
            raise UserError(
                f"{base}: holds no tensor {unknown[0]!r}, so it is stored in another format than the export; "
                "a patch needs a base in the present format"
            )
        left_out = sorted(before.file_of.keys() - after.file_of.keys())
        if left_out:
            raise UserError(f"{base}: tensor {left_out[0]!r} is not in the export; a patch is of every tensor")
        configs = {
            name: (exported / name).read_text(encoding="utf-8") for name in CONFIGS if (exported / name).is_file()
        }
        patch_checks.check_configs(configs, str(exported), base)
        allowed = Places(skeleton(AutoConfig.from_pretrained(exported)), after.file_of).footprint(footprint)
        for name in sorted(after.file_of):
            old, new = before.tensor(name), after.tensor(name)
            dtypes.add(_name_of(new.dtype))
            kept = old
            if old.dtype != new.dtype:
                cast[name] = _name_of(new.dtype)
                kept = old.to(new.dtype)
            if kept.shape != new.shape:
                raise UserError(f"{base}: tensor {name!r} is {list(old.shape)}, in the export {list(new.shape)}")
            differs = bits(kept) != bits(new)
            changed = changed_rows(differs)
            if not changed:
                untouched.add(name, new)
                continue
            if not allowed.covers(name, changed):
                raise RuntimeError(f"{exported}: tensor {name!r} moved outside the footprint; no patch is made of it")
            # Of a tensor that may be touched in some rows no others are in the patch.
            few = differs.ndim > 1 and 2 * len(changed) <= len(differs)
            rows = changed if few or allowed.rows[name] is not None else None
            tensors[name] = after.mapped(name) if rows is None else new[rows].clone()
            touched[name] = Touched(before=digest(old), after=digest(new), rows=rows)
        files = {
            file: File(
                metadata=after.metadata(file), tensors=sorted(n for n, of in after.file_of.items() if of == file)
            )
            for file in after.files
        }
        index_metadata = after.index.get("metadata", {}) if after.index is not None else None
        out.mkdir(parents=True, exist_ok=True)
        save_tensors(out / TENSORS, tensors)
    found = (
        None if expert_set is None else json.loads(expert_set.to_json()) | {"model": without_path(expert_set.model)}
    )
    about = About(
        base=Base(name=without_path(base_name), revision=revision),
        dtypes=sorted(dtypes),
        footprint={name: None if rows is None else sorted(rows) for name, rows in sorted(allowed.rows.items())},
        tensors=touched,
        untouched=untouched.hash(),
        cast=cast,
        files=files,
        index_metadata=index_metadata,
        configs=configs,
        expert_set=found,
        recipe_hash=recipe_hash,
        versions=versions,
        patch_sha256=sha256(out / TENSORS),
    )
    atomic_write(out / ABOUT, about.sealed())
    return about


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- apply ----------------------------------------------------------------------------------------


def read_patch(patch: Path) -> About:
    """Read and check a patch's two files.

    Raises:
        UserError: one is missing, truncated or altered, or of another format; it says what no patch may say
            (`patch_checks`).
    """
    path = patch / ABOUT
    for needed in (path, patch / TENSORS):
        if not needed.is_file():
            raise UserError(f"{needed}: not found; a patch is a folder with {ABOUT} and {TENSORS}")
    try:
        content = patch_checks.read_json(path.read_text(encoding="utf-8"), str(path))
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found not in get_args(Format):
            raise UserError(f"{path}: format: found {shown(found)}, allowed: {' and '.join(get_args(Format))}")
        seal = content.pop("sha256", None)
        about = About.model_validate(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {patch_checks.first_problem(error)}") from error
    if seal != _seal(content):
        raise UserError(f"{path}: altered; its content does not match its own hash")
    if sha256(patch / TENSORS) != about.patch_sha256:
        raise UserError(f"{patch / TENSORS}: truncated or altered; its hash is not the one in {ABOUT}")
    patch_checks.check_alone(about, path)
    return about


def apply_patch(base: str, patch: Path, out: Path, revision: str | None = None) -> Path:
    """Reproduce a repaired checkpoint, bit for bit, from its base and a patch; returns `out`.

    Works file by file: at most one weight file is in memory. Every tensor that is written is checked against the hash
    that the export had, touched or not.

    Args:
        base: folder or Hub id; a Hub id without `revision` is taken at the patch's own revision.

    Raises:
        UserError: not the patch's base; a patch or base that is damaged, altered or of another format; `out` is there
            already. Nothing is written.
        OSError: disk full or not writable; nothing is left behind.
    """
    check_new(out, "--out")
    about = read_patch(patch)
    if revision is not None and Path(base).is_dir():
        raise UserError(f"--revision: found {shown(revision)} with the local folder {base}; allowed: with a Hub id")
    if not base or Path(base).is_file():
        raise UserError(
            f"BASE: found {base!r}, {'a file' if base else 'an empty name'}; allowed: a folder, or owner/name"
        )
    with answers_understood(base):
        folder = local_folder(base, revision or about.base.revision, others=True)
    patch_checks.check_configs(about.configs, f"{patch / ABOUT}: configs", folder)
    with CheckpointFiles(folder) as before, _Content(patch, about) as content, new_folder(out) as partial:
        _check_base(before, content, about)
        untouched = _Untouched()
        for file, layout in about.files.items():

            def tensor(name: str) -> Tensor:
                made = content.applied(name, before)
                if name not in about.tensors:
                    untouched.add(name, made)
                return made

            if _as_in(before, file, layout, about.cast):
                write_like(folder / file, partial / file, tensor)
                continue
            tensors = {name: tensor(name) for name in layout.tensors}
            with tensor_errors_as_oserror(out / file):
                write_tensors(partial / file, tensors, layout.metadata)
            del tensors
        if untouched.hash() != about.untouched:
            raise UserError(f"{folder}: not the base of this patch: tensors that it does not touch differ")
        _write_other_files(folder, about, partial)
    return out


class _Content:
    """The tensors of a patch; `path`: of what says what they are."""

    def __init__(self, patch: Path, about: About) -> None:
        self._about, self.path = about, patch / ABOUT
        self._files = CheckpointFiles(patch, TENSORS)
        if self._files.file_of.keys() != about.tensors.keys():
            raise UserError(f"{patch / TENSORS}: holds other tensors than {ABOUT} names")

    def applied(self, name: str, base: CheckpointFiles) -> Tensor:
        """The checkpoint's tensor, from the patch, the base's, or both."""
        touched = self._about.tensors.get(name)
        if touched is not None and touched.rows is None:
            new = self.stored(name)
        else:
            new = base.tensor(name)
            patch_checks.check_within(self._about, self.path, name, new)
            new = patch_checks.cast(self._about, self.path, name, new)
            if touched is not None and touched.rows is not None:
                new[torch.tensor(touched.rows)] = self.stored(name)
        if touched is not None and digest(new) != touched.after:
            raise UserError(f"{self._files.folder / TENSORS}: tensor {name!r} does not give the exported one")
        return new

    def check_fits(self, name: str, old: Tensor) -> None:
        """`UserError` unless what the patch holds of a tensor fits the base's, `old`."""
        patch_checks.check_tensor(self._about, self.path, name, old, self.stored(name))

    def stored(self, name: str) -> Tensor:
        """What the patch holds of a tensor: all of it or its touched rows."""
        return self._files.tensor(name)

    def __enter__(self) -> _Content:
        self._files.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


def _check_base(before: CheckpointFiles, content: _Content, about: About) -> None:
    patch_checks.check_covers(about, content.path, before)
    for name, touched in about.tensors.items():
        old = before.tensor(name)
        if digest(old) != touched.before:
            raise UserError(
                f"{before.folder}: not the base of this patch ({about.base.name}): tensor {name!r} differs"
            )
        content.check_fits(name, old)


def _as_in(base: CheckpointFiles, file: str, layout: File, cast: Mapping[str, str]) -> bool:
    """Whether the base has this file with the same tensors, so that its header can be kept."""
    names = {name for name, of in base.file_of.items() if of == file}
    return names == set(layout.tensors) and not names & cast.keys() and base.metadata(file) == layout.metadata


def _write_other_files(base: Path, about: About, out: Path) -> None:
    copy_other_files(base, out)
    for name, text in about.configs.items():
        (out / name).write_text(text)
    with CheckpointFiles(base) as before:
        same = before.index is not None and all(
            _as_in(before, file, layout, {}) for file, layout in about.files.items()
        )
    if same:
        shutil.copyfile(base / INDEX, out / INDEX)
    elif about.index_metadata is not None:
        weight_map = {name: file for file, layout in about.files.items() for name in layout.tensors}
        index = {"metadata": about.index_metadata, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
