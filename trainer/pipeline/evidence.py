"""What a run folder proves of its model: that the files are those which its steps wrote, and the figures theirs.

`manifest.json` keeps the hash of every output of a step, and for every step the hashes of what it rests on; the recipe
has its own. So a file that was edited, replaced or added shows, and so does a figure. These are no signatures: who
makes up a whole run, hashes and all, is not found out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.errors import UserError
from trainer.pipeline.measure import changes_in
from trainer.recipe.schema import tree_hash
from trainer.recipe.yaml import read_yaml
from trainer.release.hub import MODEL, PATCH
from trainer.reporting.artefacts import Artefacts
from trainer.run.manifest import MANIFEST, Manifest, StepRecord
from trainer.runtime.files import sha256

_AGAIN = "run its recipe again"
_SIDES = {side: f"stages/evaluate-{side}/metrics.json" for side in ("before", "after")}
_READ = ("pairs.jsonl", "activations.parquet", "expert_set.json", "audit.json")
"""What the card is made of, besides the stages' files."""


def check(manifest: Manifest, stages: Mapping[str, StepRecord], run: Artefacts) -> dict[str, StepRecord]:
    """The steps whose records hold, after everything that can be checked was; `run` keeps what they wrote alone.

    Args:
        stages: name -> record, all finished.

    Raises:
        UserError: names the file or key that is not what a step wrote.
    """
    folder = run.folder
    _check_recipe(folder, manifest)
    proven = {name: stage for name, stage in stages.items() if _rests(name, stages)}
    for name in ("export", "evaluate-before", "evaluate-after"):
        if name in stages and name not in proven:
            raise UserError(
                f"{folder / MANIFEST}: stages.{name}.after: found other hashes than those of the steps that it rests "
                f"on; {_AGAIN}"
            )
    outputs = {path: digest for stage in proven.values() for path, digest in stage.outputs.items()}
    exported = proven["export"].outputs
    _check_files(folder, outputs, exported)
    _check_nothing_else(folder, outputs, exported)
    _check_evaluation(run, proven)
    run.recipe = manifest.recipe
    run.logs = {name: rows for name, rows in run.logs.items() if f"stages/{name}/log.json" in outputs}
    run.parameters = {name: n for name, n in run.parameters.items() if f"stages/{name}/parameters.json" in outputs}
    return proven


def _check_recipe(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    if tree_hash(manifest.recipe) != manifest.recipe_hash:
        raise UserError(f"{path}: recipe: changed; its hash is not recipe_hash; {_AGAIN}")
    section = manifest.recipe.get("run")
    seed = section.get("seed") if isinstance(section, dict) else None
    if seed != manifest.seed:
        raise UserError(f"{path}: seed: found {manifest.seed}, allowed: {seed}, the recipe's")
    if read_yaml(folder / "recipe.yaml") != manifest.recipe:
        raise UserError(f"{folder / 'recipe.yaml'}: changed; not the recipe of {MANIFEST}; {_AGAIN}")


def _rests(name: str, stages: Mapping[str, StepRecord], above: tuple[str, ...] = ()) -> bool:
    """Whether a step rests on what the steps before it have written as it stands now."""
    return name not in above and all(
        before in stages and stages[before].digest == digest and _rests(before, stages, (*above, name))
        for before, digest in stages[name].after.items()
    )


def _check_files(folder: Path, outputs: Mapping[str, str], exported: Mapping[str, str]) -> None:
    for name, digest in outputs.items():
        path = _inside(folder, name)
        # Weights in the middle of a run are large, and may be cleared away; they are not pushed.
        if not path.exists() and name not in exported and path.suffix == ".safetensors":
            continue
        if not path.is_file() or sha256(path) != digest:
            what = "the run's audit" if name in exported else "its step wrote it"
            raise UserError(f"{path}: missing, or changed since {what}; {_AGAIN}")


def _inside(folder: Path, name: str) -> Path:
    """A recorded path as a file in the folder, reached through no link."""
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or "\0" in name:
        raise UserError(f"{folder / MANIFEST}: outputs: found {name!r}, allowed: a path inside the run folder")
    path = folder / name
    for part in (path, *path.parents):
        if part == folder:
            break
        if part.is_symlink():
            raise UserError(f"{part}: is a link; only the file itself, as its step wrote it, is pushed")
    return path


def _check_nothing_else(folder: Path, outputs: Mapping[str, str], exported: Mapping[str, str]) -> None:
    present = [path.relative_to(folder).as_posix() for path in _walk(folder / MODEL)]
    for name in (*present, *PATCH):
        if name not in exported and os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: no step of this run wrote it, so it is not pushed; remove it")
    for name in _READ:
        if name not in outputs and (folder / name).exists():
            raise UserError(f"{folder / name}: no step of this run wrote it as it stands; {_AGAIN}, or remove it")


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below that is no folder itself; links are named, not followed."""
    if folder.is_symlink() or not folder.is_dir():
        yield from [folder] if folder.is_symlink() else []
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.is_symlink():
            yield from _walk(path)
        else:
            yield path


# --- evaluation.json ------------------------------------------------------------------------------


def _check_evaluation(run: Artefacts, proven: Mapping[str, StepRecord]) -> None:
    path = run.folder / "evaluation.json"
    recorded = {name for stage in proven.values() for name in stage.outputs}
    for side, name in _SIDES.items():
        if name not in recorded:
            raise UserError(f"{path}: {side}: no step of this run measured it ({name}); {_AGAIN}")
        _refuse_other(path, side, run.evaluation[side], [_json(run.folder / name)])
    _refuse_other(path, "changes", run.evaluation.get("changes"), [changes_in(run.folder)])
    written = {name: list(_objects(run.folder, stage)) for name, stage in proven.items()}
    parts = {key: part for key, part in run.evaluation.items() if key not in (*_SIDES, "changes", "version")}
    diagnostics = parts.pop("diagnostics", {})
    parts |= {f"diagnostics.{key}": part for key, part in diagnostics.items()}
    for key, part in parts.items():
        _refuse_other(path, key, part, _candidates(key.rpartition(".")[2], written))


def _candidates(key: str, written: Mapping[str, list[Any]]) -> Iterator[Any]:
    """What a part of the evaluation may be: nothing, that key of a step's file, or all of the file of its name."""
    yield {}
    for name, objects in written.items():
        for found in objects:
            if isinstance(found, dict) and key in found:
                yield found[key]
            if key.endswith(name.replace("-", "_")):
                yield found


def _objects(folder: Path, stage: StepRecord) -> Iterator[Any]:
    for name in stage.outputs:
        if name.endswith(".json") and not name.startswith(MODEL) and name not in PATCH:
            yield _json(folder / name)


def _refuse_other(path: Path, key: str, found: object, allowed: Iterable[Any]) -> None:
    if not any(_same(found, other) for other in allowed):
        raise UserError(f"{path}: {key}: found other figures than the steps of this run wrote; {_AGAIN}")


def _same(a: Any, b: Any) -> bool:
    """Equal, where a number that was computed again may differ in its last digits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return bool(a == b and isinstance(a, bool) == isinstance(b, bool))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
