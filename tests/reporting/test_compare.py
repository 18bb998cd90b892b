"""Runs side by side."""

import json
from pathlib import Path

import pytest

from data_prep.errors import UserError
from trainer.reporting.compare import FIGURES, comparison, markdown


def finished(folder: Path, name: str, asr: float) -> Path:
    for stage in ("1-repair-1", "2-consistency-1"):
        (folder / name / "stages" / stage).mkdir(parents=True)
    rate = {"rate": asr, "n": 10, "ci95": [0, 1], "unjudged": 0}
    measured = dict.fromkeys(FIGURES, rate)
    diagnostics = {"router_restore_gap": 0.01, "experts_changed": 8, "experts_total": 64}
    (folder / name / "evaluation.json").write_text(
        json.dumps(
            {"before": dict.fromkeys(FIGURES, rate | {"rate": 1.0}), "after": measured, "diagnostics": diagnostics}
        )
    )
    stages = {
        "repair-1": {"seconds": 10.4, "peak_memory_mb": 900.0},
        "consistency-1": {"seconds": 5.0, "peak_memory_mb": 1200.0},
        "evaluate-after": {"seconds": 100.0, "peak_memory_mb": 5000.0},
    }
    (folder / name / "manifest.json").write_text(json.dumps({"name": name, "stages": stages}))
    sizes = {"trained_parameters": 5, "total_parameters": 100}
    (folder / name / "stages/1-repair-1/parameters.json").write_text(json.dumps(sizes))
    (folder / name / "stages/2-consistency-1/parameters.json").write_text(
        json.dumps(sizes | {"trained_parameters": 1})
    )
    return folder / name


def test_the_base_and_every_run_have_a_row_with_figures_and_training_cost(tmp_path: Path) -> None:
    columns, rows = comparison([finished(tmp_path, "a", 0.1), finished(tmp_path, "b", 0.2)])
    assert [row[0] for row in rows] == ["base", "a", "b"]
    assert rows[0][1] == "1.000" and rows[1][1] == "0.100"
    cost = dict(zip(columns, rows[1], strict=True))
    assert (cost["weights trained"], cost["training s"], cost["peak MB"]) == ("5.0%", "15", "1200")
    assert cost["experts changed"] == "8 of 64"
    assert markdown(columns, rows).count("\n") == len(rows) + 1


def test_a_folder_without_an_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no evaluation\.json"):
        comparison([tmp_path / "nothing"])
