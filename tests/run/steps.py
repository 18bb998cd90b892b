"""A step of one text, done the way a method does it; for the tests of the run folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.recipe.schema import Recipe
from trainer.run.folder import Run
from trainer.runtime.files import atomic_write

Load = Callable[..., Recipe]


@dataclass(frozen=True)
class Text:
    """A step's artefact: one text."""

    path: Path

    def write(self, made: str) -> None:
        atomic_write(self.path, made)

    def files(self) -> list[Path]:
        return [self.path]

    def read(self) -> str:
        return self.path.read_text()


def work(run: Run, inputs: str = "1", name: str = "pairs", content: str = "x", after: list[str] | None = None) -> bool:
    """Do a step the way a method does; whether there was anything to do."""
    made = []

    def make() -> str:
        made.append(name)
        return content

    before = [run.step(n, lambda: content, Text(run.dir / f"{n}.txt"), inputs="1") for n in after or []]
    step = run.step(name, make, Text(run.dir / f"{name}.txt"), inputs=inputs, after=before)
    assert step.value == (run.dir / f"{name}.txt").read_text(), "what a run goes on with is what is on disk"
    return bool(made)


def interrupted(run: Run, name: str = "pairs", inputs: str = "1") -> None:
    """A step that is killed in its middle."""
    with pytest.raises(KeyboardInterrupt):
        run.step(name, _killed, Text(run.dir / f"{name}.txt"), inputs=inputs)


def _killed() -> str:
    raise KeyboardInterrupt


def manifest(run: Run) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run.dir / "manifest.json").read_text())
    return loaded
