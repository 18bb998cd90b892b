"""A golden run of the organism recipes: what a change of the house must leave as it was.

    python -m tests.golden before.json                       # on one side of a change
    python -m tests.golden after.json --against before.json  # on the other; exits with 1 where anything differs

Recorded are the expert sets, the sha256 of every exported tensor and of the activation counts, `steering.json` and
every figure of `evaluation.json`. One process, fp32: on one machine equal code gives equal bits. Between machines sums
round differently, so both sides are run on the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from data_prep.organism.build import OrganismConfig, build

SOURCES = ("harmful", "benign", "borderline")
SMALL = [
    *(f"data.{source}.{part}={rows}" for source in SOURCES for part, rows in (("train", 24), ("test", 8))),
    *("detect.max_pairs=16", "detect.bootstrap=5", "repair.max_steps=4", "repair.logging_steps=2"),
    *("consistency.max_steps=2", "consistency.logging_steps=1", "evaluate.random_control=false"),
]
CASES: dict[str, tuple[str, list[str]]] = {
    "rasa": ("rasa", []),
    "steermoe": ("steermoe", []),
    "rasa-lora-replay": (
        "rasa",
        [*SMALL, "repair.lora_rank=4", "repair.lora_alpha=8.0", "repair.routing=replay",
         "consistency.target=original"],
    ),
    "rasa-saliency-gates": (
        "rasa",
        [*SMALL, "detect.score=saliency", "repair.train_gates=true", "repair.retain_loss=ce", "schedule.rounds=2",
         "evaluate.steering_baseline=true", "evaluate.random_control=true", "steer.n_pos=2"],
    ),
    "rasa-full": ("rasa", [*SMALL, "repair.scope=full", "consistency.enabled=false"]),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--case", action="append", choices=CASES, help="by default every one")
    given = parser.parse_args()
    build(Path(".cache/organism"))
    build(Path(".cache/organism-causal"), OrganismConfig(knock_out=0.25))
    found = {name: golden(*CASES[name]) for name in given.case or CASES}
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for name, parts in found.items():
        print(f"{name}: {len(parts['tensors'])} tensors, sha256 of all {digest(parts['tensors'])}")
    if given.against is None:
        return 0
    other = json.loads(given.against.read_text())
    differing = [line for name in found for line in differences(other[name], found[name], name)]
    print("\n".join(differing[:40]) or f"equal to {given.against} in every value")
    return 1 if differing else 0


def golden(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Run a recipe of the organism anew and read what it left."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainer", "run", f"recipes/organism/{recipe}.yaml", *overrides]
        subprocess.run([*command, f"run.output_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder).iterdir()
        experts = json.loads((run / "expert_set.json").read_text())
        steering = run / "steering.json"
        return {
            "experts": [[m["layer"], m["expert"], m["score"], m["stability"]] for m in experts["members"]],
            "activations": digest(pd.read_parquet(run / "activations.parquet").to_csv()),
            "tensors": dict(tensors(run / "model")),
            "steering": json.loads(steering.read_text()) if steering.exists() else None,
            "evaluation": json.loads((run / "evaluation.json").read_text()),
        }


def tensors(model: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                value = file.get_tensor(name)
                yield name, hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()


def digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Any, after: Any, at: str) -> Iterator[str]:
    """One line for every value that differs; a key that only the newer side has is no difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from differences(value, after.get(key), f"{at}.{key}")
    elif before != after:
        yield f"{at}: {json.dumps(before)[:100]} -> {json.dumps(after)[:100]}"


if __name__ == "__main__":
    sys.exit(main())
