"""`manifest.json`: which recipe a run folder belongs to and which of its steps are done."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from data_prep.errors import UserError
from trainer import __version__
from trainer.moe.json_files import first_problem
from trainer.recipe.schema import Recipe
from trainer.recipe.tree import plain_tree
from trainer.runtime.files import sha256_text

MANIFEST = "manifest.json"
FORMAT: Literal["routealign-run-2"] = "routealign-run-2"
FORMER = ("routealign-run-1",)
"""Formats of former releases, whose steps rest on other inputs and so cannot be taken up."""


class OldRunError(UserError):
    """A run folder that a former release began."""


def _inside(path: str) -> str:
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
        raise ValueError(f"found {path!r}, expected a path inside the run folder")
    return path


InFolder = Annotated[str, AfterValidator(_inside)]
Measured = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StepRecord(BaseModel):
    """What the manifest keeps of a step. `outputs`: path relative to the run folder -> hex sha256.

    `recipe_hash`: of the recipe that it was made under, or was last found good under; None in older runs.
    """

    status: Literal["started", "finished"]
    inputs: str
    after: dict[str, str] = {}
    outputs: dict[InFolder, str] = {}
    started: str
    recipe_hash: str | None = None
    seconds: Measured | None = None
    peak_memory_mb: Measured | None = None
    peak_gpu_memory_mb: Measured | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 over a finished step's outputs: what a later step depends on."""
        assert self.status == "finished", "a step is used before it is finished"
        return sha256_text(repr(sorted(self.outputs.items())))


class Manifest(BaseModel):
    """`format` is what tells a run folder of ours from any other folder.

    `recipe` is the one in force: of the finished steps. `mixed`: finished steps were replaced, or another recipe came
    into force, and no run has gone through all its steps since.
    """

    format: Literal["routealign-run-2"] = FORMAT
    name: str
    created: str
    recipe_hash: str
    recipe: Annotated[dict[str, Any], AfterValidator(lambda tree: plain_tree(tree))]
    seed: int
    versions: dict[str, str]
    mixed: bool = False
    stages: dict[str, StepRecord] = {}

    @classmethod
    def fresh(cls, recipe: Recipe) -> Manifest:
        """Of a run in which nothing was done yet."""
        return cls(
            name=recipe.run.name,
            created=now(),
            recipe_hash=recipe.hash(),
            recipe=recipe.tree(),
            seed=recipe.run.seed,
            versions=versions(),
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run folder.

        Raises:
            OldRunError: a former release began the run.
            UserError: there is none, or it cannot be understood.
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: not a run folder; expected {MANIFEST} in it") from None
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            if _format(content) in FORMER:
                raise OldRunError(
                    f"{folder}: begun by a former release ({_format(content)}), whose steps this one cannot take up; "
                    "start anew with --force or under another run.name (its files stay readable)"
                ) from None
            raise UserError(
                f"{path}: not a manifest of RouteAlign, or damaged: {first_problem(error)}; "
                "remove the folder by hand, or choose another run.name"
            ) from error

    @property
    def finished(self) -> bool:
        """Whether any step is finished, so that there is something to lose."""
        return any(step.status == "finished" for step in self.stages.values())

    @property
    def current(self) -> dict[str, StepRecord]:
        """The steps of the recipe in force, without those that only another one had or began."""
        return {name: step for name, step in self.stages.items() if step.recipe_hash in (None, self.recipe_hash)}

    def require_settled(self, folder: Path) -> None:
        """`UserError` where the steps are of more than one recipe, or some were made again and later ones not yet."""
        if self.mixed:
            raise UserError(
                f"{folder}: its steps do not belong together: some were made anew and the run did not come to its "
                "end since; run its recipe again (what is done is kept)"
            )

    def put_in_force(self, recipe: Recipe, steps: Collection[str]) -> None:
        """From now on the folder is one of this recipe, made with these libraries; `steps` are good under it."""
        fresh = Manifest.fresh(recipe)
        self.mixed = self.mixed or (self.finished and fresh.recipe_hash != self.recipe_hash)
        for name in ("recipe", "recipe_hash", "name", "seed", "versions"):
            setattr(self, name, getattr(fresh, name))
        for name in steps:
            self.stages[name] = self.stages[name].model_copy(update={"recipe_hash": self.recipe_hash})

    def text(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def source(self, folder: Path) -> str:
        """How an error in the recipe that it keeps begins."""
        made_by = self.versions.get("routealign", "unknown")
        return f"{folder / MANIFEST}: of version {made_by}, --force starts anew"


def _format(content: bytes) -> object:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found.get("format") if isinstance(found, dict) else None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of this release and of the libraries that a result rests on."""
    found = {"routealign": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "peft", "trl", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
