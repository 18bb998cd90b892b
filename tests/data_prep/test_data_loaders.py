"""Every format reads true-to-life files, and every bad file gives one line that says what is wrong."""

import json
from pathlib import Path

import pytest

from data_prep.errors import UserError, unknown
from data_prep.loaders import FORMATS, Source, load


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def texts(format: str, path: str, **options: object) -> list[str]:
    options.setdefault("kind", "harmful")
    return [row.text for row in load(format, Source(path, **options))]  # type: ignore[arg-type]


def test_unknown_suggests_the_closest() -> None:
    error = unknown("colour", "gren", ["green", "red"])
    assert str(error) == "unknown colour 'gren' (did you mean 'green'?); allowed: green, red"
    assert "did you mean" not in str(unknown("colour", "zzz", ["green", "red"]))


def test_csv_with_byte_order_mark_crlf_and_multiline_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'goal,target\r\n"one\r\nmore",x\r\ntwo,y\r\n', "utf-8-sig")
    assert texts("advbench", path) == ["one\r\nmore", "two"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv"])
def test_records_in_every_file_type(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": "one", "answer": "1"}, {"prompt": "", "answer": "0"}, {"prompt": "two", "answer": "2"}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(str(path))
    elif suffix == "csv":
        write(path, "prompt,answer\none,1\n,0\ntwo,2\n")
    else:
        write(path, json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    rows = load("records", Source(str(path), "benign"))
    assert [(row.text, row.answer) for row in rows] == [("one", "1"), ("two", "2")]


def test_records_named_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Behavior,note\none,1\n")
    assert texts("records", path, column="note") == ["1"]


def test_xstest_side_follows_the_use(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id,prompt,label\n1,kill a process,safe\n2,bad,unsafe\n")
    assert texts("xstest", path, kind="borderline") == ["kill a process"]
    assert texts("xstest", path, kind="harmful") == ["bad"]


def test_alpaca_joins_input(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing", "input": "", "output": "la"},
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    assert texts("alpaca", path) == ["Add\n\n1 and 2", "Sing"]


def test_qa_reads_both(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", json.dumps({"question": "2+2", "answer": "4"}))
    assert load("qa", Source(path, "capability"))[0].answer == "4"


@pytest.mark.parametrize(
    ("name", "text", "format", "says"),
    [
        ("a.csv", "gaol,target\nx,y\n", "advbench", "column of .*a.csv 'goal' .did you mean 'gaol'"),
        ("a.csv", "question\nx\n", "qa", "column of .*'answer'"),
        ("a.csv", "other\nx\n", "records", "column of .*'prompt'"),
        ("a.csv", "prompt\nx\n", "xstest", "'label'"),
        ("a.csv", "prompt\n", "records", "holds no rows"),
        ("a.csv", "prompt,b\n,1\n", "records", "no usable rows"),
        ("a.jsonl", "", "records", "holds no rows"),
        ("a.json", "{", "records", "a.json: not valid JSON"),
        ("a.json", '{"a": 1}', "records", "list of objects"),
        ("a.txt", "x", "records", "file type"),
        ("a.csv", "prompt\nx\n", "recods", "data format 'recods' .did you mean 'records'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, format: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        texts(format, write(tmp_path / name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.csv", "folder/nowhere.csv", "/absent/file.json"])
def test_missing_file_never_asks_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        texts("records", path)


def test_hub_data_sets_are_asked_by_name_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def fake(path: str, name: str | None, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((path, name, split, revision))
        return [{"prompt": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert texts("records", "owner/name", hub_split="test", revision="abc", hub_config="main") == ["one"]
    assert texts("records", "owner/name") == ["one"]
    assert asked == [("owner/name", "main", "test", "abc"), ("owner/name", None, "train", None)]


def test_hub_failure_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(UserError, match="no route") as caught:
        texts("records", "owner/name")
    assert "\n" not in str(caught.value)


def test_formats_are_those_of_the_recipe() -> None:
    from typing import get_args

    from data_prep.config import SourceFormat

    assert set(FORMATS) == set(get_args(SourceFormat))


def test_a_line_of_json_ends_where_the_file_says(tmp_path: Path) -> None:
    """Texts may hold Unicode's own line separators, which `str.splitlines` would cut at."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False) + "\r\n\n{not\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: not valid JSON"):
        texts("records", str(path))
    path.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False) + "\r\n")
    assert texts("records", str(path)) == ["one\u2028two"]
