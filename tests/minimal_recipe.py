"""Fixtures of conftest.py: a minimal recipe as a mapping, a file, a loader, and an open run of it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.methods.table import load_recipe
from trainer.recipe.schema import Recipe
from trainer.run.folder import Run

MINIMAL: dict[str, Any] = {
    "run": {"name": "first"},
    "model": {"name_or_path": "some/model"},
    "data": {
        "harmful": {"path": "harmful.jsonl", "train": 8, "test": 4},
        "jailbreaks": {"path": "wrappers.json", "seen": ["a"], "unseen": ["b"]},
        "benign": {"path": "benign.jsonl"},
        "borderline": {"path": "borderline.jsonl"},
    },
}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A minimal valid recipe as a mapping; its runs go under the test's own folder."""
    made = copy.deepcopy(MINIMAL)
    made["run"]["output_dir"] = str(tmp_path / "runs")
    return made


@pytest.fixture
def recipe_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def load(recipe_file: Path) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(recipe_file, overrides)


@pytest.fixture
def opened(load: Callable[..., Recipe]) -> Iterator[Run]:
    with Run.open(load()) as run:
        yield run
