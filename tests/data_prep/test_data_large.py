"""A file of any size is drawn from in the same memory, and reads as a small one does."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import json_lines
from data_prep.config import DataConfig
from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.loaders import Source, load

TEXT = "a lamp in the hall and another one on the stairs, " * 20  # 1 kB


def write(path: Path, rows: int) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": [f"{i} {TEXT}" for i in range(rows)]}), path, row_group_size=1000)
        return path
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("prompt,label\n")
            file.writelines(f'"{i} {TEXT}",x\n' for i in range(rows))
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps({"prompt": f"{i} {TEXT}"}) + "\n" for i in range(rows))
        else:
            file.write("[\n")
            file.writelines(json.dumps({"prompt": f"{i} {TEXT}"}) + ",\n" for i in range(rows))
            file.write('{"prompt": "last"}]\n')
    return path


def peak(path: Path) -> int:
    config = DataConfig.model_validate({"benign": {"path": str(path), "train": 20, "test": "100:120"}})
    tracemalloc.start()
    try:
        corpus = load_corpus(config, 0)
        found = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.benign.test[0].text.startswith("100 ") and len(corpus.benign.train) == 20
    return found


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    small, large = (peak(write(tmp_path / f"{n}.{suffix}", n)) for n in (4_000, 12_000))
    # 8 MB more of text; the places of rows take 36 bytes each.
    assert large - small < 1_500_000, (small, large)


@pytest.mark.slow
def test_a_million_rows_are_drawn_from_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "{i} {TEXT[:200]}"}}\n' for i in range(1_000_000))
    code = (
        "import sys, resource; from data_prep.config import DataConfig; from data_prep.corpus import load_corpus;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "config = DataConfig.model_validate({'benign': {'path': sys.argv[1], 'train': 1000, 'test': 1000}});"
        "corpus = load_corpus(config, 0); assert corpus.rows[0].read == 1_000_000;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000, "kB; the file has 220 MB"


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.text(max_size=12) | st.integers() | st.none() | st.lists(st.text()))
    ),
    piece=st.integers(1, 9),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_list_read_piece_by_piece_is_the_list(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, object]],
    piece: int,
    indent: int | None,
    ascii: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_PIECE", piece)
        assert [row for _, row in json_lines.read_json_list(path)] == rows


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"prompt": "a"},\n {"prompt": "b"}\n {"prompt": "c"}]', r"row 2 \(line 3\): not valid JSON: expected ','"),
        ('[{"prompt": "a"},\n {"prompt": "b}]', r"row 1 \(line 2\): not valid JSON: Unterminated string"),
        ('[{"prompt": "a"},\n\n {"prompt" "b"}]', r"row 1 \(line 3\): not valid JSON: Expecting ':'"),
        ('[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', r"row 1 \(line 1\): not valid JSON: .*one key twice"),
        ('[{"prompt": "a"},\n 3]', r"row 1 \(line 2\): expected an object, found int"),
        ('[{"prompt": "a"}', r"row 1 .*found the end of the file"),
        ('[{"prompt": "a"},]', r"row 1 .*not valid JSON"),
        ('[{"prompt": "a"}] more', r"row 1 .*text behind the end"),
        ('[{"prompt": "a"},\n{"prompt": 3}]', r"row 1 \(line 2\), column 'prompt': found a number"),
    ],
)
@pytest.mark.parametrize("piece", [4, 1 << 20])
def test_a_broken_list_is_named_with_row_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str, piece: int
) -> None:
    monkeypatch.setattr(json_lines, "_PIECE", piece)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load("records", Source(str(tmp_path / "a.json"), "benign"))
    assert "\n" not in str(caught.value)


def test_a_packed_file_that_is_cut_is_one_line(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "one"}\n' * 500)[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be unpacked"):
        load("records", Source(str(path), "benign"))
    path.write_bytes(b'{"prompt": "one"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be unpacked"):
        load("records", Source(str(path), "benign"))
