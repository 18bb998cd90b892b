"""The run folder: who owns it, what was done in it, and where a new start takes up again."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from data_prep.errors import UserError
from trainer.recipe.schema import Recipe
from trainer.recipe.yaml import dump_yaml
from trainer.run.lock import Lock
from trainer.run.manifest import MANIFEST, Manifest, OldRunError, StepRecord, now, versions
from trainer.run.step import Artefact, Step
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import atomic_write, sha256, sha256_text
from trainer.runtime.processes import PeakMemory, from_rank_0

LOCK = ".lock"
FOLDERS = ("stages", "model")
# A folder may be resumed only by a recipe that agrees in these; other sections decide which steps run again.
IDENTITY = ("method", "run.seed", "model", "data")

M = TypeVar("M")
T = TypeVar("T")


class Run:
    """An open run folder. Held by one run at a time, until `close` or the end of the process.

    `manifest` says what is in force on disk. The recipe that was opened comes into force when the first step
    completes under it, or when `settle` says that a whole run did; until then nothing of the former one is touched.
    """

    def __init__(self, folder: Path, recipe: Recipe, manifest: Manifest, lock: Lock | None) -> None:
        self.dir, self.recipe, self.manifest, self._lock = folder, recipe, manifest, lock
        self._recipe_hash = recipe.hash()
        self._done: list[str] = []

    @classmethod
    def open(cls, recipe: Recipe, *, force: bool = False) -> Run:
        """Make or take up the folder `<output_dir>/<name>` of a recipe; `force` empties a run folder first.

        `UserError` where another process holds the folder, where it belongs to another recipe or release or holds
        something that is no run. `OSError` where it cannot be written.
        """
        folder, lock, manifest = recipe.folder, None, None
        # A refusal frees the lock: a program that goes on may open the folder with another recipe.
        with contextlib.ExitStack() as on_error:
            if is_main_process():
                with _naming_the_key(folder):
                    _refuse_foreign(folder, force)
                    folder.mkdir(parents=True, exist_ok=True)
                lock = Lock.take(folder / LOCK, f"{folder}: in use by process {{pid}}; wait for it, or set run.name")
                on_error.callback(lock.release)
                if force:
                    _empty(folder)
                resumes = (folder / MANIFEST).exists()
                manifest = _resumed(folder, recipe) if resumes else Manifest.fresh(recipe)
                _write(folder, manifest)
            manifest = from_rank_0(manifest)
            on_error.pop_all()
        assert manifest is not None, "rank 0 has a manifest or raised"
        return cls(folder, recipe, manifest, lock)

    @classmethod
    def reopen(cls, folder: Path, recipe_of: Callable[..., Recipe]) -> Run:
        """Take up an existing run folder, wherever it lies now, with the recipe that its manifest keeps.

        Args:
            recipe_of: makes a recipe of a plain dict; `source` begins its errors.
        """
        manifest = Manifest.read(folder)
        _refuse_files(folder)
        recipe = recipe_of(manifest.recipe, source=manifest.source(folder))
        lock = None
        if is_main_process():
            lock = Lock.take(folder / LOCK, f"{folder}: in use by process {{pid}}; wait for it")
        return cls(folder, recipe, from_rank_0(manifest), lock)

    def step(
        self,
        name: str,
        make: Callable[[], M],
        kept: Artefact[M, T],
        *,
        inputs: str,
        after: Sequence[Step[Any]] = (),
    ) -> Step[T]:
        """The step `name`: done before and kept, or made now. Its value is read back from disk either way.

        A step that has to run again says why on the console. Its former record and outputs stay as they are until the
        new ones are written, so that a step that fails or is refused costs nothing.

        Args:
            make: collective; of what it returns rank 0's is written.
            inputs: a hash of what the step reads.
            after: the steps whose results it builds on.

        Raises:
            OSError: an output is missing or the disk is full; the step then counts as not done.
        """
        record, done = self._begin(name, _wanted(inputs, after))
        if not done:
            clock, memory = time.monotonic(), PeakMemory()
            made = make()
            if is_main_process():
                kept.write(made)
                outputs = {path: sha256(self.dir / path) for path in self.files(kept.files())}
                spent: dict[str, Any] = {"seconds": round(time.monotonic() - clock, 3), **memory.read()}
                record = record.model_copy(update={"status": "finished", "outputs": outputs, **spent})
            record = from_rank_0(record)
            self._finish(name, record)
        self._done.append(name)
        return Step(name, record, kept.read())

    def identity(self, name: str, inputs: str, after: Sequence[Step[Any]] = ()) -> str:
        """Hex sha256 over everything that a step rests on: what a checkpoint in its middle must agree with."""
        wanted = _wanted(inputs, after)
        return sha256_text(repr((name, wanted.inputs, sorted(wanted.after.items()))))

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
                raise FileNotFoundError(2, "the step did not write this output", str(path))
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            found.update(p.resolve().relative_to(self.dir.resolve()).as_posix() for p in files)
        return sorted(found)

    def settle(self) -> None:
        """The method went through all its steps: they belong together, and to this recipe."""
        self.manifest.put_in_force(self.recipe, self._done)
        self.manifest.mixed = False
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest, then the recipe that it keeps, each as a whole or not at all; rank 0 only."""
        if is_main_process():
            _write(self.dir, self.manifest)

    @property
    def versions(self) -> dict[str, str]:
        """Of this release and its libraries, as they are now."""
        return versions()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, name: str, wanted: StepRecord) -> tuple[StepRecord, bool]:
        """The record to go on with, and whether the step is done. The same on every rank."""
        wanted.recipe_hash = self._recipe_hash
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
                if old is None or old.status != "finished":
                    self.manifest.stages[name] = wanted
                    self.write_manifest()
        record, done = from_rank_0((record, done))
        return record.model_copy(update={"recipe_hash": self._recipe_hash}), done

    def _finish(self, name: str, record: StepRecord) -> None:
        """Put a step's new record in the place of its former one, and the recipe in force that it was made under."""
        self.manifest.put_in_force(self.recipe, self._done)
        old = self.manifest.stages.get(name)
        self.manifest.mixed = self.manifest.mixed or (old is not None and old.status == "finished")
        self.manifest.stages[name] = record
        self.write_manifest()

    def _reason_to_redo(self, old: StepRecord, wanted: StepRecord) -> str:
        if old.status != "finished":
            return "it was interrupted"
        if old.inputs != wanted.inputs:
            return "its inputs changed"
        changed = [name for name in {**old.after, **wanted.after} if old.after.get(name) != wanted.after.get(name)]
        if changed:
            return f"what it builds on changed ({', '.join(changed)})"
        for name, digest in old.outputs.items():
            path = self.dir / name
            if path.is_dir():
                raise UserError(f"{path}: is a folder, expected the file that a step of this run wrote; remove it")
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


def _wanted(inputs: str, after: Sequence[Step[Any]]) -> StepRecord:
    return StepRecord(
        status="started", inputs=inputs, after={step.name: step.record.digest for step in after}, started=now()
    )


def _write(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST, manifest.text())
    atomic_write(folder / "recipe.yaml", dump_yaml(manifest.recipe))


def _resumed(folder: Path, recipe: Recipe) -> Manifest:
    manifest = Manifest.read(folder)
    old, new = manifest.recipe, recipe.tree()
    if old.get("method") == recipe.method:
        # Through the schema, so that a key that is new in this version compares by its default.
        old = type(recipe).of(old, source=manifest.source(folder)).tree()
    old, new = _flat(old), _flat(new)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changed = [key for key in changed if key not in ("run.name", "run.output_dir")]
    lines = [f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed]
    other = [line for key, line in zip(changed, lines, strict=True) if _is_identity(key)]
    if not manifest.finished:
        # Nothing to lose: a slip in a first try must not block the corrected recipe.
        return Manifest.fresh(recipe).model_copy(update={} if other else {"stages": manifest.stages})
    if other:
        shown = "; ".join(other[:3]) + (f" (and {len(other) - 3} more)" if len(other) > 3 else "")
        raise UserError(
            f"{folder}: holds a run of another recipe: {shown}; use --force to start anew, or set run.name"
        )
    for line in lines:
        say(f"{folder}: the recipe changed: {line}")
    current = versions()
    for name in current:
        if manifest.versions.get(name) != current[name]:
            say(f"{folder}: {name} was {manifest.versions.get(name)}, is {current[name]} now")
    return manifest


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


@contextlib.contextmanager
def _naming_the_key(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        raise OSError(f"run.output_dir: the run folder {folder} cannot be made or read: {said}") from error


def _refuse_foreign(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a run folder or nothing; set run.name or run.output_dir")
    if not folder.exists() or not any(child.name != LOCK for child in folder.iterdir()):
        return
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: not empty and no run folder (no {MANIFEST}); set run.name or run.output_dir")
    try:
        Manifest.read(folder)
    except OldRunError:
        if not force:
            raise
    if not force:
        _refuse_files(folder)


def _refuse_files(folder: Path) -> None:
    # Said before a step is made that could not be written.
    for path in (folder / name for name in FOLDERS):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path}: is no folder, expected one that a run made, or nothing; remove it")


def _empty(folder: Path) -> None:
    # The lock stays: it is ours, and removing it would let a second run in.
    for child in folder.iterdir():
        if child.name == LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
