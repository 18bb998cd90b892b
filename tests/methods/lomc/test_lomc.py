"""LoMC from the recipe to the checkpoint, or to the refusal to write one; what it may not touch, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.organism.build import Organism
from tests.methods.lomc.conftest import LOOSE, REFUSES, assert_corrected
from trainer.cli.app import main

Refused = Callable[..., str]


def ended(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_correction_within_its_bounds_is_written_audited_and_reported(
    lomc: Callable[..., Path], organism: Organism, tmp_path: Path
) -> None:
    recipe = lomc(**LOOSE, evaluate__ablation=True)
    assert ended("run", recipe) == 0
    folder = tmp_path / "runs" / "small"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    found = evaluation["diagnostics"]["correction"]
    assert found["written"] and found["kinds"] == ["experts", "mixer"]
    assert evaluation["after"]["over_refusal"]["rate"] < evaluation["before"]["over_refusal"]["rate"]
    assert_corrected(organism.model, folder)
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["untouched_identical"] and audit["reload_ok"]
    assert found["footprint"]["parameters"] > 0
    assert {"support_alone", "one_direction", "everywhere", "kinds_experts", "kinds_mixer"} <= found["ablation"].keys()
    everywhere = found["ablation"]["everywhere"]["footprint"]
    assert everywhere["parameters"] > found["footprint"]["parameters"]
    page = (folder / "report.html").read_text()
    assert "What it cost in safety" in page and "Other edits, each at its best strength" in page
    goals = [json.loads(line)["prompt"] for line in (organism.data / "harmful.jsonl").read_text().splitlines()]
    for path in folder.rglob("*.json*"):
        assert not any(goal in path.read_text() for goal in goals), path
    stamp = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert ended("run", recipe) == 0, "everything is done"
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_two_rounds_correct_is_exported_as_both_in_their_order(
    lomc: Callable[..., Path], organism: Organism, tmp_path: Path
) -> None:
    recipe = lomc(**LOOSE, correct__strengths=[0.5, 0.75])
    assert ended("run", recipe) == 0
    folder = tmp_path / "runs" / "small"
    found = json.loads((folder / "evaluation.json").read_text())["diagnostics"]["correction"]
    (second,) = found["later"]
    assert second["tried"][0]["strength"] == 0 and second["left"] > 0
    assert second["tried"][0]["over_refusal"] < found["tried"][0]["over_refusal"], "it begins where the first ends"
    assert_corrected(organism.model, folder)
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["untouched_identical"] and audit["reload_ok"]
    stamp = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert ended("run", recipe) == 0, "both rounds are read back"
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_where_safety_falls_nothing_is_written_the_report_says_why_and_the_exit_code_is_3(
    lomc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer.methods.lomc import method

    worse = {"harmful_refusal": {"difference": -0.02, "ci95": [-0.05, 0.01]}}
    monkeypatch.setattr(method, "changes", lambda experiment: worse)
    assert ended("run", lomc(**LOOSE | {"correct__max_loss": 0.04})) == 3
    line = capfd.readouterr().err.splitlines()[-1]
    assert "harmful_refusal got worse by 0.020, 95 % interval up to 0.050; nothing was written" in line
    folder = tmp_path / "runs" / "small"
    assert not (folder / "model").exists() and not list(folder.glob("patch*"))
    assert not json.loads((folder / "evaluation.json").read_text())["diagnostics"]["correction"]["written"]
    page = (folder / "report.html").read_text()
    assert "NO: safety fell beyond the bound" in page
    assert "No checkpoint was written: that it costs no safety could not be shown of harmful_refusal." in page


def test_where_no_strength_helps_within_the_bounds_nothing_is_written(
    lomc: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended("run", lomc(correct__max_kl=1e-12)) == 3
    assert "none of [0.5, 2.0] reduces wrong refusals within max_kl 1e-12" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "small" / "model").exists()


def test_without_a_wrongly_refused_prompt_there_is_nothing_to_correct(
    lomc: Callable[..., Path], refused: Refused
) -> None:
    message = refused("run", lomc(evaluate__refusal_markers=REFUSES))
    assert "nothing to correct: 0 of" in message and "harmless training prompts" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"detect__top_k": 64}, "detect.top_k: 64 selects 64 experts"),
        ({"detect__top_k": 0}, "detect.top_k: found 0"),
        ({"detect__kinds": []}, "detect.kinds"),
        ({"detect__kinds": ["experts", "experts"]}, "expected each kind once"),
        ({"detect__kinds": ["shared"]}, "detect.kinds: ['shared']: the model has no such writers"),
        ({"detect__prototypes": [500]}, "detect.prototypes: found 500"),
        ({"detect__clustering": "som"}, "detect.prototypes: not read by detect.clustering som"),
        ({"correct__strengths": [2.5]}, "correct.strengths"),
        ({"correct__strengths": [0]}, "correct.strengths"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(
    lomc: Callable[..., Path], refused: Refused, changes: dict[str, Any], words: str
) -> None:
    assert words in refused("run", lomc(**changes))
