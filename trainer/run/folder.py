"""The run folder: who owns it, what was done in it, and where a new start takes up again.

    with Run.open(recipe) as run:
        pairs = run.stage("pairs", recipe.hash("model", "data", "detect"))
        if not pairs.done:
            write_pairs(run.dir / "pairs.jsonl")
            pairs.finish([run.dir / "pairs.jsonl"])
        repair = run.stage("repair", recipe.hash("repair"), after=[pairs])

A stage is done when it finished with the same inputs, after stages with the same outputs, and its own outputs are
still on disk with the same content. Under several processes rank 0 decides and writes; the others follow it, so every
process calls `stage` and `finish` in the same order.
"""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from trainer import __version__
from trainer.recipe.schema import Recipe
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import Lock, atomic_write, sha256, sha256_text
from trainer.runtime.processes import PeakMemory, from_rank_0

MANIFEST = "manifest.json"
LOCK = ".lock"
# A folder may be resumed only by a recipe that agrees in these; other sections decide which stages run again.
IDENTITY = ("method", "run.seed", "model", "data")


class StageRecord(BaseModel):
    """What the manifest keeps of a stage. `outputs`: path relative to the run folder -> hex sha256."""

    status: Literal["started", "finished"]
    inputs: str
    after: dict[str, str] = {}
    outputs: dict[str, str] = {}
    started: str
    seconds: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None


class Manifest(BaseModel):
    """`manifest.json`. `format` is what tells a run folder of ours from any other folder."""

    format: Literal["routealign-run-1"] = "routealign-run-1"
    name: str
    created: str
    recipe_hash: str
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    stages: dict[str, StageRecord] = {}

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a run folder. `UserError` where there is none or where it cannot be understood."""
        path = folder / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: not a run folder; expected {MANIFEST} in it") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{path}: not a manifest of RouteAlign, or damaged: {where + ': ' if where else ''}{first['msg']}; "
                "remove the folder by hand, or choose another run.name"
            ) from error


class Stage:
    """One stage of a run: `done`, or to be worked on and then `finish`ed."""

    def __init__(self, run: "Run", name: str, record: StageRecord, done: bool) -> None:
        self.run, self.name, self.record, self.done = run, name, record, done
        self._clock = time.monotonic()
        self._memory = PeakMemory()

    @property
    def identity(self) -> str:
        """Hex sha256 over everything the stage rests on: what a checkpoint in its middle must agree with."""
        return sha256_text(repr((self.name, self.record.inputs, sorted(self.record.after.items()))))

    @property
    def digest(self) -> str:
        """Hex sha256 over the finished stage's outputs: what a later stage depends on."""
        assert self.record.status == "finished", f"stage '{self.name}' is used before it is finished"
        return sha256_text(repr(sorted(self.record.outputs.items())))

    def finish(self, outputs: Sequence[Path]) -> None:
        """Record the stage as finished. `outputs` are files, or folders of files, inside the run folder.

        `OSError` where an output is missing or the disk is full; the stage then counts as not done.
        """
        finished = StageRecord(status="started", inputs=self.record.inputs, started=self.record.started)
        if is_main_process():
            finished = self.record.model_copy(
                update={
                    "status": "finished",
                    "outputs": {name: sha256(self.run.dir / name) for name in self.run.files(outputs)},
                    "seconds": round(time.monotonic() - self._clock, 3),
                    **self._memory.read(),
                }
            )
            self.run.manifest.stages[self.name] = finished
            self.run.write_manifest()
        self.record = from_rank_0(finished)
        self.run.manifest.stages[self.name] = self.record
        self.done = True

    def finish_json(self, path: Path, result: Any) -> None:
        """Keep `result` as JSON, the stage's one output, and record the stage as finished."""
        if is_main_process():
            atomic_write(path, json.dumps(result, indent=1))
        self.finish([path])


class Run:
    """An open run folder. Held by one run at a time, until `close` or the end of the process."""

    def __init__(self, folder: Path, recipe: Recipe, manifest: Manifest, lock: Lock | None) -> None:
        self.dir, self.recipe, self.manifest, self._lock = folder, recipe, manifest, lock

    @classmethod
    def open(cls, recipe: Recipe, *, force: bool = False) -> "Run":
        """Make or take up the folder `<output_dir>/<name>` of a recipe; `force` empties a run folder first.

        `UserError` where another process holds the folder, where it belongs to another recipe or holds something that
        is no run. `OSError` where it cannot be written.
        """
        folder, lock, manifest = recipe.folder, None, None
        # A refusal frees the lock: a program that goes on may open the folder with another recipe.
        with contextlib.ExitStack() as on_error:
            if is_main_process():
                _refuse_foreign(folder)
                folder.mkdir(parents=True, exist_ok=True)
                lock = Lock.take(folder / LOCK, f"{folder}: in use by process {{pid}}; wait for it, or set run.name")
                on_error.callback(lock.release)
                if force:
                    _empty(folder)
                manifest = _resumed(folder, recipe) if (folder / MANIFEST).exists() else _fresh(recipe)
                atomic_write(folder / MANIFEST, _text(manifest))
                atomic_write(folder / "recipe.yaml", recipe.resolved_yaml())
            manifest = from_rank_0(manifest)
            on_error.pop_all()
        assert manifest is not None, "rank 0 has a manifest or raised"
        return cls(folder, recipe, manifest, lock)

    @classmethod
    def reopen(cls, folder: Path) -> "Run":
        """Take up an existing run folder, wherever it lies now, with the recipe that its manifest keeps."""
        manifest = Manifest.read(folder)
        recipe = _recipe_of(manifest, folder)
        lock = None
        if is_main_process():
            lock = Lock.take(folder / LOCK, f"{folder}: in use by process {{pid}}; wait for it")
        return cls(folder, recipe, from_rank_0(manifest), lock)

    def stage(self, name: str, inputs: str, *, after: Sequence[Stage] = ()) -> Stage:
        """The stage `name`, done or to be done. `inputs` is a hash of what it reads (`recipe.hash(...)`, a file's).

        A stage that has to run again says why on the console.
        """
        wanted = StageRecord(
            status="started",
            inputs=inputs,
            after={stage.name: stage.digest for stage in after},
            started=_now(),
        )
        record, done = wanted, False
        if is_main_process():
            old = self.manifest.stages.get(name)
            reason = self._reason_to_redo(old, wanted) if old else ""
            if old and not reason:
                record, done = old, True
                say(f"{name}: done before, kept")
            else:
                if old and reason:
                    say(f"{name}: runs again: {reason}")
                self.manifest.stages[name] = wanted
                self.write_manifest()
        record, done = from_rank_0((record, done))
        self.manifest.stages[name] = record
        return Stage(self, name, record, done)

    def stage_dir(self, number: int, name: str) -> Path:
        """The folder `stages/<number>-<name>/`, made if it is not there."""
        folder = self.dir / "stages" / f"{number}-{name}"
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def files(self, outputs: Sequence[Path]) -> list[str]:
        """Outputs as sorted paths relative to the run folder, folders opened up. `OSError` where one is missing."""
        found: set[str] = set()
        for path in outputs:
            if not path.exists():
                raise FileNotFoundError(2, "the stage did not write this output", str(path))
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            found.update(p.resolve().relative_to(self.dir.resolve()).as_posix() for p in files)
        return sorted(found)

    def write_manifest(self) -> None:
        """Write the manifest as a whole or not at all; rank 0 only."""
        if is_main_process():
            atomic_write(self.dir / MANIFEST, _text(self.manifest))

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reason_to_redo(self, old: StageRecord, wanted: StageRecord) -> str:
        if old.status != "finished":
            return "it was interrupted"
        if old.inputs != wanted.inputs:
            return "its inputs changed"
        changed = [name for name in {**old.after, **wanted.after} if old.after.get(name) != wanted.after.get(name)]
        if changed:
            return f"what it builds on changed ({', '.join(changed)})"
        for name, digest in old.outputs.items():
            path = self.dir / name
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != digest:
                return f"{name} was changed"
        return ""


def model_of(model_or_run: str) -> str:
    """The repaired model's folder where a run folder is named, else the name itself: a Hub id or a model's folder."""
    folder = Path(model_or_run)
    if not (folder / MANIFEST).exists():
        return model_or_run
    Manifest.read(folder)
    if not (folder / "model").is_dir():
        raise UserError(f"{folder}: this run holds no model/; `routealign export {folder}` writes it")
    return str(folder / "model")


def _text(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"


def _fresh(recipe: Recipe) -> Manifest:
    return Manifest(
        name=recipe.run.name,
        created=_now(),
        recipe_hash=recipe.hash(),
        recipe=recipe.tree(),
        seed=recipe.run.seed,
        versions=_versions(),
    )


def _resumed(folder: Path, recipe: Recipe) -> Manifest:
    manifest = Manifest.read(folder)
    # Through the schema, so that a key that is new in this version compares by its default.
    old, new = _flat(_recipe_of(manifest, folder).tree()), _flat(recipe.tree())
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changed = [key for key in changed if key not in ("run.name", "run.output_dir")]
    lines = [f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed]
    other = [line for key, line in zip(changed, lines, strict=True) if _is_identity(key)]
    if other and not any(stage.status == "finished" for stage in manifest.stages.values()):
        return _fresh(recipe)  # nothing to lose: a first try that failed on a slip must not block the corrected recipe
    if other:
        shown = "; ".join(other[:3]) + (f" (and {len(other) - 3} more)" if len(other) > 3 else "")
        raise UserError(
            f"{folder}: holds a run of another recipe: {shown}; use --force to start anew, or set run.name"
        )
    for line in lines:
        say(f"{folder}: the recipe changed: {line}")
    versions = _versions()
    for name in versions:
        if manifest.versions.get(name) != versions[name]:
            say(f"{folder}: {name} was {manifest.versions.get(name)}, is {versions[name]} now")
    return manifest.model_copy(
        update={"recipe_hash": recipe.hash(), "recipe": recipe.tree(), "name": recipe.run.name, "versions": versions}
    )


def _recipe_of(manifest: Manifest, folder: Path) -> Recipe:
    made_by = manifest.versions.get("routealign", "unknown")
    return Recipe.of(manifest.recipe, source=f"{folder / MANIFEST}: of version {made_by}, --force starts anew")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_identity(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in IDENTITY)


def _flat(tree: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not isinstance(tree, dict) or (at and not tree):
        return {at: tree}
    return {key: v for name, sub in tree.items() for key, v in _flat(sub, f"{at}.{name}" if at else name).items()}


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a run folder or nothing; set run.name or run.output_dir")
    if not folder.exists() or not any(child.name != LOCK for child in folder.iterdir()):
        return
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: not empty and no run folder (no {MANIFEST}); set run.name or run.output_dir")
    Manifest.read(folder)


def _empty(folder: Path) -> None:
    # The lock stays: it is ours, and removing it would let a second run in.
    for child in folder.iterdir():
        if child.name == LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"routealign": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "peft", "trl", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
