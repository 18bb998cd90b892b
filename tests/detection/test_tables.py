"""Count tables of other tools come in whole, checked, and never as code."""

import os
import pickle
from pathlib import Path

import pandas as pd
import pytest

from data_prep.errors import UserError
from trainer.detection.tables import COUNTS, check_model, convert_pickle, load_table

ROWS = [(0, 0, 6, 4, 2, 3), (0, 1, 4, 6, 3, 2), (1, 0, 10, 0, 0, 5), (1, 1, 0, 10, 5, 0)]
TABLE = pd.DataFrame(ROWS, columns=list(COUNTS))


def write(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".pkl":
        table.to_pickle(path)
    else:
        table.to_json(path, orient="records")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_a_table_is_read_from_every_format_in_any_row_order(suffix: str, tmp_path: Path) -> None:
    mixed = TABLE.sample(frac=1, random_state=1).assign(risk_diff=0.5)
    pd.testing.assert_frame_equal(load_table(write(mixed, tmp_path / f"t{suffix}")), TABLE)


def test_a_json_table_by_columns_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(TABLE.to_json(orient="columns"))
    pd.testing.assert_frame_equal(load_table(path), TABLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a1": None}, "column 'a1' is missing; expected layer, expert, a1, d1, a2, d2; found"),
        ({"a1": [6.5, 4, 10, 0]}, "column 'a1', row 0: expected a whole number"),
        ({"d2": [3, "x", 0, 5]}, "column 'd2', row 1: expected a whole number"),
        ({"a2": [2, 3, -1, 5]}, "column 'a2', row 2: expected a whole number"),
        ({"a1": [1e300, 4, 10, 0]}, "column 'a1', row 0: expected a whole number"),
        ({"expert": [0, 0, 0, 1]}, "expert 0 of layer 0 is named twice"),
        ({"d1": [4, 6, 1, 10]}, r"a1 \+ d1 is 10 in one row and 11 in another"),
        ({"a1": [6, 5, 10, 0], "d1": [4, 5, 0, 10]}, "layer 0 is active 1.1 times per token on side 1"),
    ],
)
def test_a_faulty_table_is_refused_with_its_column_and_row(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    faulty = TABLE.drop(columns=[k for k, v in change.items() if v is None])
    faulty = faulty.assign(**{k: v for k, v in change.items() if v is not None})
    path = write(faulty, tmp_path / "t.csv")
    with pytest.raises(UserError, match=message) as refused:
        load_table(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_table_of_another_model_is_refused() -> None:
    check_model(TABLE, {0: 2, 1: 2}, {0: 1, 1: 1}, "t")
    with pytest.raises(UserError, match="t: counts of 2 layers and 4 experts; the model has 3 MoE layers"):
        check_model(TABLE, {0: 2, 1: 2, 2: 2}, {0: 1, 1: 1, 2: 1}, "t")
    with pytest.raises(UserError, match="layer 0 has 1 active experts per token, the model's router chooses 2"):
        check_model(TABLE, {0: 2, 1: 2}, {0: 2, 1: 2}, "t")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.json"])
@pytest.mark.parametrize("content", [b"\x00\x01 not a table", b"", b"\xff", b"[" * 100_000, b"3", b"PAR1" * 9])
def test_what_is_no_table_is_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_table(path)


def test_a_table_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file; expected a table of counts"):
        load_table(tmp_path / "none.csv")


def test_another_file_type_is_refused_and_a_pickle_pointed_to_the_converter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file type of .*'.xlsx'.*allowed: .csv, .parquet, .json"):
        load_table(tmp_path / "t.xlsx")
    with pytest.raises(UserError, match=r"pickles are not read; `python -m trainer.detection.tables"):
        load_table(tmp_path / "t.pkl")


# --- pickles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_a_pickled_pandas_table_is_converted(suffix: str, protocol: int, tmp_path: Path) -> None:
    pickled, to = tmp_path / "t.pkl", tmp_path / f"t{suffix}"
    table = pd.DataFrame(TABLE.to_numpy(), columns=pd.Index(list(COUNTS), dtype=object))
    pickled.write_bytes(pickle.dumps(table, protocol=protocol))
    convert_pickle(pickled, to)
    pd.testing.assert_frame_equal(load_table(to), TABLE)


class Planted:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments  # type: ignore[return-value]


@pytest.mark.parametrize("where", ["bare", "inside a table"])
@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "numpy gadget", "pandas gadget"])
def test_a_pickle_that_would_run_something_is_refused_before_it_does(kind: str, where: str, tmp_path: Path) -> None:
    from numpy.testing._private.utils import runstring

    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w')"
    planted = {
        "os.system": Planted(os.system, f"touch {witness}"),
        "builtins.eval": Planted(eval, code),
        "numpy gadget": Planted(runstring, code, {}),
        "pandas gadget": Planted(pd.read_pickle, str(tmp_path / "other.pkl")),
    }[kind]
    content = planted if where == "bare" else pd.DataFrame({"a": pd.Series([planted], dtype=object)})
    path = tmp_path / "t.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"the pickle asks for .*, which no table of counts needs; it is not read"):
        convert_pickle(path, tmp_path / "t.csv")
    assert not witness.exists() and not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(pickle.dumps({"a": 1}), "holds dict"), (b"\x80\x04 cut", "cannot be read"), (b"", "cannot be read")],
)
def test_a_pickle_without_a_table_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert_pickle(path, tmp_path / "t.csv")
