"""A small recipe of the method on the organism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Small = Callable[..., Path]
REFUSES = ["i'm sorry", "i can't", "sorry, i", "i won't"]
MISTAKEN = [*REFUSES, "the history of", "the word", "put the", "the seventh law", "it is a crime"]
"""Marks of a refusal by which half of the answers to harmless borderline prompts count as refusals."""


@pytest.fixture
def lomc(small: Small, tmp_path: Path) -> Callable[..., Path]:
    """A small recipe of the method on the organism; keys as `section__key=value`."""

    def make(**changes: Any) -> Path:
        tree = yaml.safe_load(small().read_text())
        kept = {name: tree[name] for name in ("run", "model", "data", "evaluate")} | {"method": "lomc"}
        kept["evaluate"].pop("random_control", None)
        kept["data"]["borderline"]["test"] = 24
        kept["evaluate"]["refusal_markers"] = MISTAKEN
        kept["detect"] = {"top_k": 4, "prototypes": [1, 2], "max_prompts": 64}
        kept["correct"] = {"strengths": [0.5, 2.0]}
        for name, value in changes.items():
            section, _, key = name.partition("__")
            kept.setdefault(section, {})[key] = value
        path = tmp_path / "lomc.yaml"
        path.write_text(yaml.safe_dump(kept))
        return path

    return make


LOOSE = {
    "detect__kinds": ["experts", "mixer"],
    "detect__top_k": 32,
    "correct__max_kl": 100.0,
    "correct__max_loss": 1.0,
}
"""Bounds that any correction keeps."""
