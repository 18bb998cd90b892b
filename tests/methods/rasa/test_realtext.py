"""The same command on a real-text checkpoint and true benchmark files, where they lie beside the checkout."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.cli.app import main

Found = dict[str, Any]


@pytest.fixture(scope="module")
def short(shared: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """`evaluation.json` of a short repair by the shipped real-text recipe, with the audit under `audit`."""
    folder = tmp_path_factory.mktemp("short")
    text = (root / "recipes/realtext/rasa.yaml").read_text().replace("../shared", str(shared))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(text)))
    cut_down = [
        'data.harmful.train="0:40"',
        'data.harmful.test="420:424"',
        "data.benign.train=60",
        "data.benign.test=12",
        'data.borderline.test="1:40:2"',
        "detect.max_pairs=40",
        "detect.bootstrap=20",
        "repair.max_steps=24",
        "repair.recombined=0.25",
        "evaluate.random_control=false",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), f"run.output_dir={folder}", *cut_down])
    assert ended.value.code == 0
    made = folder / "realtext-rasa"
    evaluation: Found = json.loads((made / "evaluation.json").read_text())
    return evaluation | {"audit": json.loads((made / "audit.json").read_text()), "folder": made}


def test_a_short_repair_on_true_files_moves_only_its_experts(short: Found) -> None:
    before, after = short["before"], short["after"]
    assert before["asr_seen"]["rate"] >= 0.9
    assert after["asr_seen"]["rate"] <= before["asr_seen"]["rate"] - 0.2
    assert short["audit"]["reload_ok"] and short["audit"]["untouched_identical"]
    assert short["audit"]["experts_changed"] <= 0.15 * short["audit"]["experts_total"]


def test_no_text_of_a_harmful_goal_is_written(short: Found, shared: Path) -> None:
    with (shared / "data/advbench/harmful_behaviors.csv").open(newline="") as file:
        goals = [row["goal"] for row in csv.DictReader(file)]
    for path in short["folder"].rglob("*"):
        if path.suffix in (".json", ".jsonl", ".html", ".yaml", ".csv") and path.parent.name != "model":
            text = path.read_text()
            assert not any(goal in text for goal in goals), path.name
