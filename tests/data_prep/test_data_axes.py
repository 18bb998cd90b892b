"""The rows of axes: answers and wrong answers by column, no text on both sides, and the organism's three axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.axes import load_axes
from data_prep.config import AxisSource
from data_prep.errors import UserError
from data_prep.organism import axes as organism
from data_prep.organism import world
from data_prep.schema import Conversation, Prompt


def source(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> AxisSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AxisSource(path=str(path), **{"train": "0:3", "test": "3:5", **keys})


ROWS = [{"q": f"question {i}", "a": f"answer {i}", "no": ["x", f"y {i}"], "safe": i != 1} for i in range(7)]


def test_answers_are_read_by_column_and_rows_by_value(tmp_path: Path) -> None:
    one = source(tmp_path, ROWS, column="q", answer_column="a", wrong="no", only={"safe": True})
    (axis,) = load_axes({"honest": one}, {"honest": True}, [], 0).axes
    assert [prompt.text for prompt in axis.train] == ["question 0", "question 2", "question 3"]
    assert axis.train[1].answer == "answer 2" and axis.train[1].wrong == ("x", "y 2")
    assert [prompt.text for prompt in axis.test] == ["question 4", "question 5"]


def test_no_training_row_has_the_text_of_a_test_row_of_any_axis_or_of_what_else_is_measured(tmp_path: Path) -> None:
    """So a data set with several answers to a question is split by question."""
    (tmp_path / "b").mkdir()
    rows = [{"prompt": f"w{i % 4}", "answer": f"a {i}"} for i in range(8)]
    first = source(tmp_path, rows, train="0:6", test="6:8")
    second = source(tmp_path / "b", [{"prompt": f"W{i}!", "answer": "b"} for i in range(4)], train="0:2", test="2:3")
    tested = [Prompt("t:0", Conversation.of("w0"), "benign")]
    loaded = load_axes({"a": first, "b": second}, {"a": True, "b": True}, tested, 0)
    assert [prompt.text for prompt in loaded.axes[0].train] == ["w1"]
    assert [prompt.text for prompt in loaded.axes[0].test] == ["w2", "w3"]
    assert [prompt.text for prompt in loaded.axes[1].train] == ["W1!"]
    assert loaded.notes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train": 0}, "axes.0.data.train: found 0; allowed: 1 or more"),
        ({"answer_column": "reply"}, "column of"),
        ({"format": "qa", "column": "q", "wrong": "a"}, "axes.0.data.wrong: read with format records alone"),
        ({"column": "q", "answer_column": "empty"}, "axes.0.data.train: row rows:0 has no answer"),
    ],
)
def test_bad_input_names_the_key(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    rows = [row | {"empty": " ", "prompt": row["q"]} for row in ROWS]
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        load_axes({"honest": source(tmp_path, rows, **keys)}, {"honest": True}, [], 0)


def test_the_organisms_axes_share_no_text_and_forbidden_test_pairs_are_new(tmp_path: Path) -> None:
    organism.write(tmp_path, 3)
    texts: set[str] = set()
    for axis in organism.AXES:
        rows = [json.loads(line) for line in (tmp_path / f"axis_{axis}.jsonl").read_text().splitlines()]
        assert [row["part"] for row in rows] == ["train"] * 240 + ["test"] * 120
        assert not texts & {row["prompt"] for row in rows}
        texts |= {row["prompt"] for row in rows}
        assert rows == organism.rows(axis, 3) != organism.rows(axis, 4)
    new = world.theme_pairs("test", 3)
    for row in organism.rows("harmless", 3):
        seen = [pair for pair in new if f" {pair[0]} " in row["prompt"] and pair[1] in row["prompt"]]
        assert bool(seen) == (row["part"] == "test")


def test_the_honest_axis_says_a_place_exactly_where_the_prompt_says_it() -> None:
    for row in organism.rows("honest", 0):
        given = [place for place in organism.PLACES if f" {place}" in row["prompt"]]
        if row["answer"].startswith("I cannot say"):
            assert not any(f" {did} the " in row["prompt"] for did in organism.PUT)
        else:
            assert any(row["answer"].endswith(f"{place}.") for place in given)
