"""A small recipe of the method on the organism."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

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


def assert_corrected(base: Path, run: Path) -> None:
    """The export is W - strength d d^T W of the base's own weights in the units of the support, one round after the
    other, and has the base's bytes everywhere else.
    """
    found = json.loads((run / "evaluation.json").read_text())["diagnostics"]["correction"]
    units = {(layer, kind, expert) for layer, kind, expert in json.loads((run / "support.json").read_text())["units"]}
    before, after = (load_file(path / "model.safetensors") for path in (base, run / "model"))
    rounds = [(load_file(run / "directions.safetensors"), str(found["prototypes"]), found["strength"])]
    later = load_file(run / "rounds.safetensors")
    rounds += [(later, str(at), one["strength"]) for at, one in enumerate(found["later"])]
    moved = set()
    assert before.keys() == after.keys() and found["footprint"]["units"] == len(units)
    for name, old in before.items():
        assert after[name].dtype == old.dtype == torch.float32
        if torch.equal(old, after[name]):
            continue
        parts = name.split(".")
        layer, kind = int(parts[2]), "mixer" if "self_attn" in name else "experts"
        assert name.endswith(("o_proj.weight", "down_proj.weight"))
        moved.add((layer, kind, int(parts[5]) if kind == "experts" else None))
        wanted, new = old.double(), after[name].double()
        for directions, prefix, strength in rounds:
            d = directions[f"{prefix}.{layer}"].double()
            wanted -= strength * torch.outer(d, d @ wanted)
        torch.testing.assert_close(new, wanted, atol=1e-6, rtol=0)
        if len(rounds) == 1:
            torch.testing.assert_close(d @ new, (1 - found["strength"]) * (d @ old.double()), atol=1e-6, rtol=0)
    assert moved == units
