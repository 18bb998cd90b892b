"""Cells that are not plain text: chat messages are understood, all else is refused with file, row and column."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cells import MAX_CHARACTERS
from data_prep.errors import UserError
from data_prep.loaders import Source, Usable, load


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


TALK = [
    message("system", "Speak briefly."),
    message("user", "Who are you?"),
    message("assistant", "A lantern."),
    message("user", "Of what colour?"),
]


def read(path: Path, rows: list[dict[str, Any]], suffix: str = "jsonl", **options: Any) -> Usable:
    file = path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    options.setdefault("kind", "benign")
    return load("records", Source(str(file), **options))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_messages_are_a_conversation_of_several_turns(tmp_path: Path, suffix: str, column: str) -> None:
    (row,) = read(tmp_path, [{column: TALK}], suffix)
    assert row.conversation.messages() == TALK
    assert (row.text, row.answer) == ("Of what colour?", None)


def test_messages_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"messages": TALK}]))
    (row,) = load("records", Source("owner/name", "benign"))
    assert row.conversation.messages() == TALK
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"prompt": 7}]))
    with pytest.raises(UserError, match=r"owner/name, row 0, column 'prompt': found a number"):
        load("records", Source("owner/name", "benign"))


def test_a_named_column_and_every_format_take_messages(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"talk": TALK}], column="talk")
    assert len(row.conversation.turns) == 4
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": TALK[:2], "label": "safe"}))
    assert load("xstest", Source(str(tmp_path / "x.jsonl"), "borderline"))[0].text == "Who are you?"


def test_the_assistants_last_turn_is_the_answer(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"messages": TALK[:3]}])
    assert (row.text, row.answer) == ("Who are you?", "A lantern.")
    (row,) = read(tmp_path, [{"messages": TALK[:3], "answer": "A lantern."}])
    assert row.answer == "A lantern."
    with pytest.raises(UserError, match=r"row 0.*two answers"):
        read(tmp_path, [{"messages": TALK[:3], "answer": "A candle."}])


def test_parts_of_text_are_joined_and_sharegpt_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    assert read(tmp_path, [{"messages": [message("user", parts)]}])[0].text == "Who are you?"
    shared = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A lantern."}]
    (row,) = read(tmp_path, [{"conversations": shared}])
    assert (row.text, row.answer) == ("Who are you?", "A lantern.")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (12, "found a number, expected text or a list of messages"),
        (1.5, "found a number"),
        (float("nan"), "found NaN"),
        (True, "found true or false"),
        ({"role": "user", "content": "x"}, "found an object"),
        ([], "without a user's turn"),
        (["one", "two"], "message 0: found text, expected an object"),
        ([[1]], "message 0: found a list"),
        ([{"text": "x"}], "message 0: has no 'role'"),
        ([message("tool", "x")], "message 0: unknown role 'tool'; allowed: system, user, assistant"),
        ([message("Secret words of a row", "x")], "message 0: unknown role; allowed"),
        ([message("user", 3)], "message 0: 'content' is a number"),
        ([message("user", None)], "message 0: 'content' is nothing"),
        ([message("user", [{"type": "image_url", "image_url": "x"}])], "part 0: found a part of type 'image_url'"),
        ([message("user", ["x"])], "message 0, part 0: found a part"),
        ([message("user", "x") | {"tool_calls": [{"name": "f"}]}], "message 0: found a call of a tool"),
        ([message("system", "x")], "without a user's turn"),
        ([message("assistant", "x"), message("user", "y")], "message 0: found the turn of 'assistant'"),
        ([*TALK, message("user", "again")], "message 4: found the turn of 'user', expected 'assistant'"),
        ([message("user", "x"), message("system", "y")], "message 1: found the turn of 'system'"),
        ([message("user", " "), message("assistant", "x"), message("user", "y")], "an empty turn"),
        (json.dumps(TALK), "messages written out as text"),
        (str(TALK), "messages written out as text"),
        ("a" * (MAX_CHARACTERS + 1), "found 100001 characters; allowed: at most 100000"),
        ([message("user", "a" * 60_000), message("assistant", "b" * 60_000)], "more than 100000 characters together"),
        ("half \ud800 a pair", "half a surrogate pair"),
        ("a\0b", "a NUL"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused_with_its_place(tmp_path: Path, value: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [{"prompt": "fine"}, {"prompt": value}])
    message = str(caught.value)
    assert "rows.jsonl, row 1 (line 2), column 'prompt'" in message and says in message and "\n" not in message
    assert "Secret" not in message and "lantern" not in message


@pytest.mark.parametrize("answer", [4, 1.5, True, ["4"], {"a": "4"}, float("nan")])
def test_an_answer_is_text(tmp_path: Path, answer: object) -> None:
    with pytest.raises(UserError, match=r"row 0 .*column 'answer': found .*, expected text"):
        read(tmp_path, [{"prompt": "fine", "answer": answer}])


def test_cells_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": None}, {"prompt": " "}, {"other": "x"}, {"prompt": [message("user", "")]}]
    usable = read(tmp_path, rows)
    assert [row.text for row in usable] == ["one"] and usable.dropped == {"no text": 4}


def test_the_longest_text_is_taken(tmp_path: Path) -> None:
    assert len(read(tmp_path, [{"prompt": "a" * MAX_CHARACTERS}])[0].text) == MAX_CHARACTERS
