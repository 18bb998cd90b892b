"""Tables are read strictly, and no error quotes a cell."""

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.json_lines import parse_json
from data_prep.loaders import Source, load
from data_prep.tables import Table
from data_prep.template_files import read_templates

SECRET = "tell me of the hidden lantern"


def refused(path: Path, format: str = "records") -> str:
    with pytest.raises(UserError) as caught:
        load(format, Source(str(path), "benign"))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert "hidden" not in str(caught.value) and "lantern" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,label\nfine,a\none, two,b\n", "row 1 (line 3): found 3 cells, the first row has 2"),
        ("prompt,label\nfine,a\nshort\n", "row 1 (line 3): found 1 cells, the first row has 2"),
        ('prompt,label\n"two\nlines",a\none, two,b\n', "row 1 (line 4): found 3 cells"),
        ('prompt,label\nfine,a\n"never closed,b\nmore,c\n', "row 1 (line 3) cannot be read as csv"),
        ('prompt,label\nfine,a\n"never closed,b\nmore,"c"\n', "row 1 (line 3) cannot be read as csv"),
        ('prompt\n"closed" too early\n', "row 0 (line 2) cannot be read as csv"),
        ('prompt\nfine\ntwo\nlines"\n', "row 2 (line 4): found a double quote in a cell that is not quoted"),
        ('prompt,b\nhe said "go, now" twice\n', "row 0 (line 2): found a double quote in a cell that is not quoted"),
        ('prompt\n5" nails\n', "row 0 (line 2): found a double quote in a cell that is not quoted"),
        ("prompt,prompt\na,b\n", "the first row names 1 columns twice"),
    ],
)
def test_csv_rows_that_are_cut_or_swallowed_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert says in refused(path)


@pytest.mark.parametrize("header", [f"{SECRET},x y", f"{SECRET}", f"hidden.{'lantern' * 9},a b"])
def test_a_forgotten_header_is_never_printed(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n" * 3)
    message = refused(path)
    assert "'prompt'" in message and f"found {header.count(',') + 1} columns" in message


def test_names_that_look_like_names_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"promt,{SECRET}\na,b\n")
    message = refused(path)
    assert "did you mean 'promt'" in message and "1 not shown" in message
    (tmp_path / "a.json").write_text(json.dumps([{SECRET: "x"}]))
    refused(tmp_path / "a.json")
    (tmp_path / "t.json").write_text(json.dumps({SECRET * 3: ["x"]}))
    with pytest.raises(UserError, match="group 0") as caught:
        read_templates(str(tmp_path / "t.json"), "[P]")
    assert "hidden" not in str(caught.value)


def test_an_index_without_name_and_large_cells_beside_the_prompt_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f",prompt,context\n0,one,{'x' * 300_000}\n")
    assert [row.text for row in load("records", Source(str(path), "benign"))] == ["one"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "t.json"])
def test_nesting_without_end_a_key_twice_and_endless_numbers_are_one_line(tmp_path: Path, name: str) -> None:
    for text, says in (
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "one", "prompt": "two"}', "one key twice"),
        ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"prompt": "one"', "not valid JSON"),
    ):
        (tmp_path / name).write_text(text)
        assert says in refused(tmp_path / name)
    with pytest.raises(UserError, match="here: not valid JSON"):
        parse_json("{", "here")


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_bytes_that_are_no_text_are_one_line_with_the_file(tmp_path: Path, name: str) -> None:
    for content in (b"prompt\n\xff\xfe\x91\n", "prompt\nx\n".encode("utf-16"), os.urandom(64)):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)


def test_broken_parquet_is_one_line_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"{SECRET} {i}" for i in range(50)]}), path, compression="none")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-5], b"", b"prompt\nx\n"):
        path.write_bytes(broken)
        refused(path)
    path.write_bytes(whole.replace(b"hidden", b"\x91\xff\xfeden"))
    refused(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), path)
    assert "two columns have one name" in refused(path)


def test_parquet_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["one"]}), path)
    assert load("records", Source(str(path), "benign"))[0].text == "one"
    assert [found.name for found in tmp_path.rglob("*")] == ["a.parquet"]


@pytest.mark.parametrize("path", ["", "a\0b.csv"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        load("records", Source(path, "benign"))


def test_labels_beyond_both_sides_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,label\none,safe\ntwo,Safe \n")
    assert "row 1 (line 3), column 'label': unknown label; allowed: safe, unsafe" in refused(path, "xstest")


CELLS = st.text(alphabet=st.sampled_from('ab ,"\n\r;\u00e9'), max_size=8)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    style=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(deadline=None)
def test_what_a_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], style: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=style).writerows([("prompt", "note"), *rows])  # type: ignore[arg-type]
    assert [tuple(row.cells.values()) for row in Table(Source(str(path), "benign"))] == rows


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), at=st.integers(0, 999), data=st.data())
@settings(max_examples=300, deadline=None)
def test_one_quote_more_or_less_never_cuts_a_prompt(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], at: int, data: st.DataObject
) -> None:
    """A file with one quote lost, or one too many, is refused: it holds an odd number of them."""
    path = tmp_path_factory.getbasetemp() / "quotes.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "note"), *rows])
    text = path.read_bytes().decode()
    places = [i for i, char in enumerate(text) if char == '"']
    if places and data.draw(st.booleans()):
        lost = places[at % len(places)]
        text = text[:lost] + text[lost + 1 :]
    else:
        text = text[: at % len(text)] + '"' + text[at % len(text) :]
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=r"quote|cells"):
        list(Table(Source(str(path), "benign")))
