"""A step of a run: skipped where it is done, else made, written, recorded and read back.

    pairs = run.step("pairs", make_pairs, JsonFile(run.dir / "pairs.json"), inputs=digest)
    repair = run.step("repair", train, kept, inputs=other, after=[pairs])

A step is done when it finished with the same inputs, after steps with the same outputs, and its own outputs are still
on disk with the same content. What a run goes on with is what was read back from disk, so that a resumed run goes on
with the same; the weights of a stage just trained alone are in memory already. Under several processes rank 0 decides
and writes; the others follow, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from trainer.run.manifest import StepRecord
from trainer.runtime.files import atomic_write

M = TypeVar("M", contravariant=True)
T = TypeVar("T", covariant=True)


class Artefact(Protocol[M, T]):
    """What a step leaves in the run folder."""

    def write(self, made: M) -> None:
        """Put what was made on disk, each file whole or not at all; rank 0 alone."""

    def files(self) -> Sequence[Path]:
        """The files and folders that are there now, all inside the run folder."""

    def read(self) -> T:
        """The step's value, from disk; every rank."""


@dataclass(frozen=True)
class JsonFile:
    """One value as JSON."""

    path: Path

    def write(self, made: Any) -> None:
        atomic_write(self.path, json.dumps(made, indent=1))

    def files(self) -> Sequence[Path]:
        return [self.path]

    def read(self) -> Any:
        return json.loads(self.path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Kept(Generic[M, T]):
    """An artefact from three functions."""

    writing: Callable[[M], None]
    kept_files: Callable[[], Sequence[Path]]
    reading: Callable[[], T]

    def write(self, made: M) -> None:
        self.writing(made)

    def files(self) -> Sequence[Path]:
        return self.kept_files()

    def read(self) -> T:
        return self.reading()


@dataclass(frozen=True)
class Step(Generic[T]):
    """A finished step and its value."""

    name: str
    record: StepRecord
    value: T
