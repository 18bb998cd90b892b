"""Tables of activation counts from other tools, checked: columns `layer, expert, a1, d1, a2, d2`, a row per expert.

    python -m trainer.detection.tables COUNTS.pkl COUNTS.parquet

turns a pandas pickle, in which some published measurements come, into such a table. A pickle can run code when it is
read, so this reader builds nothing but tables: it refuses every global outside pandas and numpy, and of those two
every one that is not on its list, because both hold functions that open files or run text. Column names that pandas 3
keeps in pyarrow are refused with the rest. Nothing else here reads pickles.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa

from data_prep.errors import UserError, unknown
from trainer.runtime.files import replacing

COUNTS = ("layer", "expert", "a1", "d1", "a2", "d2")
MOST = 2**53
"""The largest count: beyond it a float holds no longer every whole number."""
SUFFIXES = (".csv", ".parquet", ".json")


def load_table(path: Path) -> pd.DataFrame:
    """A count table, sorted by layer and expert; columns besides `COUNTS` are left out.

    Raises:
        UserError: an unreadable file, a missing column, counts that are not whole numbers of 0 or more, an expert
            named twice, or counts that break `check_counts`; names file, column and row.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        raise UserError(
            f"{path}: pickles are not read; `python -m trainer.detection.tables {path} OUT.parquet` converts"
        )
    if path.suffix not in SUFFIXES:
        raise unknown(f"file type of {path}", path.suffix, SUFFIXES)
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, encoding="utf-8-sig")
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a table of counts ({', '.join(SUFFIXES)})") from None
    except (ValueError, TypeError, ImportError, OSError, RecursionError, pa.ArrowException) as error:
        # Of pandas, pyarrow and json alike.
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    return checked(table, str(path))


def checked(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The columns `COUNTS` of a table as int64, sorted. Raises `UserError`, see `load_table`."""
    missing = [name for name in COUNTS if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise UserError(f"{source}: column {missing[0]!r} is missing; expected {', '.join(COUNTS)}; found {found}")
    if table.empty:
        raise UserError(f"{source}: holds no rows")
    clean = {}
    for name in COUNTS:
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = numbers.isna() | (numbers < 0) | (numbers % 1 != 0) | (numbers > MOST)
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise UserError(f"{source}: column {name!r}, row {row}: expected a whole number of 0 or more")
        clean[name] = numbers.astype("int64")
    counts = pd.DataFrame(clean).sort_values(["layer", "expert"], ignore_index=True)
    twice = counts.duplicated(["layer", "expert"])
    if twice.any():
        layer, expert = counts.loc[twice.to_numpy().argmax(), ["layer", "expert"]]
        raise UserError(f"{source}: expert {expert} of layer {layer} is named twice")
    check_counts(counts, source)
    return counts


def check_counts(counts: pd.DataFrame, source: str) -> None:
    """What every true measurement obeys: one number of tokens per side, and k experts active per token and layer.

    Raises:
        UserError: a1 + d1 or a2 + d2 differs between rows, or a side's active tokens of a layer are no whole multiple
            of its tokens, or not the same multiple on both sides.
    """
    for side in (1, 2):
        tokens = counts[f"a{side}"] + counts[f"d{side}"]
        if tokens.nunique() > 1:
            raise UserError(
                f"{source}: a{side} + d{side} is {tokens.min()} in one row and {tokens.max()} in another; "
                "every expert is counted on the same tokens"
            )
    n1, n2 = (int((counts[f"a{side}"] + counts[f"d{side}"]).iloc[0]) for side in (1, 2))
    if n1 == 0 or n2 == 0:
        raise UserError(f"{source}: side {1 if n1 == 0 else 2} has no tokens")
    for layer, active in counts.groupby("layer")[["a1", "a2"]].sum().iterrows():
        if active.a1 % n1 or active.a2 % n2 or active.a1 // n1 != active.a2 // n2:
            raise UserError(
                f"{source}: layer {layer} is active {active.a1 / n1:.4g} times per token on side 1 and "
                f"{active.a2 / n2:.4g} on side 2; a router chooses the same whole number of experts on both"
            )


def check_model(counts: pd.DataFrame, experts: Mapping[int, int], top_k: Mapping[int, int], source: str) -> None:
    """Whether a table is of a model with these experts and top-k by layer. Raises `UserError` where it is not."""
    found = counts.groupby("layer").expert.agg(["size", "max"])
    sizes = {int(layer): int(row["size"]) for layer, row in found.iterrows()}
    if sizes != dict(experts) or any(row["max"] >= experts[int(layer)] for layer, row in found.iterrows()):
        raise UserError(
            f"{source}: counts of {len(sizes)} layers and {sum(sizes.values())} experts; the model has "
            f"{len(experts)} MoE layers and {sum(experts.values())} experts, numbered as in its decoder"
        )
    tokens = int(counts.a1.iloc[0] + counts.d1.iloc[0])
    for layer, active in counts.groupby("layer").a1.sum().items():
        if active != top_k[int(layer)] * tokens:
            raise UserError(
                f"{source}: layer {layer} has {active // tokens} active experts per token, the model's router "
                f"chooses {top_k[int(layer)]}"
            )


# --- pandas pickles -------------------------------------------------------------------------------

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric", "numpy")
_PANDAS_INDEXES = ("pandas.core.indexes.base", "pandas.core.indexes.range", "pandas.core.indexes.numeric")
ALLOWED = frozenset(
    [
        *(
            (module, name)
            for module in _NUMPY
            for name in ("_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype")
        ),
        *(
            (module, name)
            for module in _PANDAS_INDEXES
            for name in ("_new_Index", "Index", "RangeIndex", "Int64Index")
        ),
        ("pandas.core.frame", "DataFrame"),
        *(("pandas", name) for name in ("DataFrame", "Index", "RangeIndex")),
        ("pandas.core.internals.managers", "BlockManager"),
        ("pandas.core.internals.blocks", "new_block"),
        ("pandas._libs.internals", "_unpickle_block"),
        ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
        ("pandas.core.arrays.string_", "StringArray"),
        ("pandas.core.arrays.string_", "StringDtype"),
        # The one name from elsewhere: where a block of columns lies in the table. It holds three numbers.
        ("builtins", "slice"),
    ]
)


class _TablesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"the pickle asks for {module}.{name}, which no table of counts needs; it is not read")
        return super().find_class(module, name)


def convert_pickle(pickled: Path, to: Path) -> pd.DataFrame:
    """Read a pickled pandas table under the rule above, check it, and write it as CSV, Parquet or JSON.

    Raises:
        UserError: a global that is not allowed, a damaged file, no table in it, or what `checked` refuses.
    """
    to = Path(to)
    if to.suffix not in SUFFIXES:
        raise unknown(f"file type of {to}", to.suffix, SUFFIXES)
    with Path(pickled).open("rb") as file:
        table = _unpickled(file, pickled)
    if not isinstance(table, pd.DataFrame):
        raise UserError(f"{pickled}: holds {type(table).__name__}, expected a pandas table")
    counts = checked(table.reset_index() if "layer" not in table.columns else table, str(pickled))
    with replacing(to) as temporary:
        if to.suffix == ".csv":
            counts.to_csv(temporary, index=False)
        elif to.suffix == ".parquet":
            counts.to_parquet(temporary, index=False)
        else:
            counts.to_json(temporary, orient="records")
    return counts


def _unpickled(file: BinaryIO, source: Path) -> Any:
    try:
        return _TablesOnly(file).load()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as a pandas pickle: {error}") from error


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m trainer.detection.tables COUNTS.pkl OUT.{csv,parquet,json}")
    try:
        convert_pickle(Path(sys.argv[1]), Path(sys.argv[2]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
