"""Fixtures of conftest.py: the embedded organism, trained once and kept where `make demo` keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.organism.build import Organism, build


@pytest.fixture(scope="session")
def organism(root: Path) -> Organism:
    """The organism of seed 0; about two minutes where it is not cached."""
    built = build(root / ".cache" / "organism")
    assert built.passed, "the organism misses its behaviour targets; see .cache/organism/behaviour.json"
    return built


Small = Callable[..., Path]


@pytest.fixture
def small(organism: Organism, root: Path, tmp_path: Path) -> Small:
    """A recipe file of the organism cut down to seconds; keyword `section__key=value` changes a key."""

    def write(**changes: Any) -> Path:
        tree = yaml.safe_load(
            (root / "recipes/organism/rasa.yaml").read_text().replace(".cache/organism", str(organism.path))
        )
        tree["run"] = {"name": "small", "output_dir": str(tmp_path / "runs")}
        for source in ("harmful", "benign", "borderline"):
            tree["data"][source] |= {"train": 24, "test": 8}
        tree["data"]["capability"] = tree["data"]["capability"][:1]
        tree["data"]["capability"][0]["test"] = 8
        tree["detect"] |= {"max_pairs": 16, "bootstrap": 5}
        tree["repair"] |= {"max_steps": 4, "logging_steps": 2}
        tree["consistency"] |= {"max_steps": 2, "logging_steps": 1}
        tree["evaluate"] = {"random_control": False}
        for key, value in changes.items():
            section, *rest = key.split("__")
            at = tree[section]
            for part in rest[:-1]:
                at = at[part]
            at[rest[-1]] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
