"""A slip is answered before any heavy library is imported, and nothing is told to anyone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SLIPS = {
    "an unknown key": ("detect", "topk", 8, "detect.topk: unknown key; did you mean 'top_k'?"),
    "an unknown argument of the trainer": ("repair", "learning_rat", 1e-3, "did you mean 'learning_rate'?"),
    "a wrong value": ("detect", "top_k", "eight", "detect.top_k: found 'eight'"),
}
HEAVY = ("torch", "transformers", "trl", "peft", "bitsandbytes", "scipy", "pandas")
SCRIPT = f"""
import sys
from trainer.cli import app
app.leave = sys.exit
try:
    app.main(sys.argv[1:])
finally:
    print("imported", [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("command", ["run", "detect", "plan", "evaluate"])
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_recipe_is_answered_without_a_heavy_library(command: str, slip: str, tmp_path: Path) -> None:
    section, key, value, words = SLIPS[slip]
    recipe = tmp_path / "recipe.yaml"
    text = "run: {name: x}\nmodel: {name_or_path: nowhere}\ndata:\n" + "".join(
        f"  {kind}: {{path: {kind}.jsonl}}\n" for kind in ("harmful", "benign", "borderline")
    )
    recipe.write_text(
        text + f"  jailbreaks: {{path: j.json, seen: [a], unseen: [b]}}\n{section}: {{{key}: {value}}}\n"
    )
    arguments = ["evaluate", "model", "--suite", recipe] if command == "evaluate" else [command, recipe]
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 2 and words in made.stderr, made.stderr
    assert "imported []" in made.stdout


def test_nobody_is_told_which_trainer_runs() -> None:
    script = "from trainer.cli import app; app._quiet(); from huggingface_hub import constants as c; print(c.{})"
    script = script.format("HF_HUB_DISABLE_TELEMETRY")
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert made.stdout.strip() == "True"
