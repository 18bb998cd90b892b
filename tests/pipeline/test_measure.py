"""The table at the end of a run, and what it warns of."""

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.pipeline.measure import print_figures

RECIPE: Any = SimpleNamespace(
    run=SimpleNamespace(name="r"), model=SimpleNamespace(name_or_path="m"), evaluate=SimpleNamespace(max_new_tokens=20)
)


def figures(cut: int) -> dict[str, Any]:
    ended = {"rate": 1 - cut / 10, "n": 10, "ci95": [0.0, 1.0], "unjudged": 0}
    length = {"mean": 17.5, "median": 20.0, "n": 10, "cut": cut}
    return {"finished": ended, "finished_benign": ended, "reply_tokens": {"all": length, "benign": length}}


def test_lengths_and_ends_of_replies_stand_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures(RECIPE, {"before": {}, "after": figures(5)})
    shown = capsys.readouterr().out
    assert "finished" in shown and "tokens of a reply, harmless" in shown and "17.5, median 20" in shown
    assert "caution" not in shown


def test_more_than_half_of_the_replies_cut_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures(RECIPE, {"before": figures(6), "after": figures(0)})
    cautions = [line for line in capsys.readouterr().out.splitlines() if "caution" in line]
    assert cautions == [
        "caution: before: evaluate.max_new_tokens = 20 cuts 6 of 10 replies; figures do not see what comes later"
    ]
