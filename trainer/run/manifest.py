"""`manifest.json`: which recipe a run folder belongs to and which of its steps are done."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from data_prep.errors import UserError
from trainer import __version__
from trainer.recipe.schema import Recipe
from trainer.runtime.files import sha256_text

MANIFEST = "manifest.json"
FORMAT: Literal["routealign-run-2"] = "routealign-run-2"
FORMER = ("routealign-run-1",)
"""Formats of former releases, whose steps rest on other inputs and so cannot be taken up."""


class OldRunError(UserError):
    """A run folder that a former release began."""


class StepRecord(BaseModel):
    """What the manifest keeps of a step. `outputs`: path relative to the run folder -> hex sha256."""

    status: Literal["started", "finished"]
    inputs: str
    after: dict[str, str] = {}
    outputs: dict[str, str] = {}
    started: str
    seconds: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 over a finished step's outputs: what a later step depends on."""
        assert self.status == "finished", "a step is used before it is finished"
        return sha256_text(repr(sorted(self.outputs.items())))


class Manifest(BaseModel):
    """`format` is what tells a run folder of ours from any other folder."""

    format: Literal["routealign-run-2"] = FORMAT
    name: str
    created: str
    recipe_hash: str
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
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
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{path}: not a manifest of RouteAlign, or damaged: {where + ': ' if where else ''}{first['msg']}; "
                "remove the folder by hand, or choose another run.name"
            ) from error

    def text(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def source(self, folder: Path) -> str:
        """How an error in the recipe that it keeps begins."""
        made_by = self.versions.get("routealign", "unknown")
        return f"{folder / MANIFEST}: of version {made_by}, --force starts anew"


def _format(content: bytes) -> object:
    try:
        found = json.loads(content)
    except ValueError:
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
