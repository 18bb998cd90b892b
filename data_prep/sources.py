"""The rows of one source: read, and dealt to its training and its test part."""

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .config import AxisSource, SourceConfig, TaskConfig, parse_slice
from .errors import UserError
from .loaders import Loaded, Usable, load
from .schema import Kind, Prompt, RowCount
from .tables import Source

Indexed = tuple[int, Loaded]
NOT_ASKED = "not asked for"


@dataclass
class Part:
    """A source of the recipe: `key` names it (`data.benign`), `dropped` counts by reason what is in neither list."""

    key: str
    kind: Kind
    read: int
    train: list[Prompt]
    test: list[Prompt]
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self) -> RowCount:
        """What became of every row."""
        dropped = {reason: n for reason, n in self.dropped.items() if n}
        return RowCount(self.key, self.read, len(self.train), len(self.test), dropped)


def source_part(kind: Kind, config: SourceConfig, seed: int, key: str | None = None) -> Part:
    """The rows of `data.<kind>` as the recipe deals them; rows that share a text are still in. Raises `UserError`.

    `key`: where the source stands in the recipe, if elsewhere.
    """
    key = key or f"data.{kind}"

    def read(path: str) -> Usable:
        return load(config.format, _source(path, kind, config))

    test_path = config.test_path or config.path
    train_key, test_key = f"{key}.train ({config.path})", f"{key}.test ({test_path})"
    if config.test == 0:
        raise UserError(
            f"{key}.test: found 0; allowed: 1 or more rows as a count or a slice: what is given is measured"
        )
    same = _file(test_path) == _file(config.path)
    train_rows = read(config.path)
    test_rows = train_rows if same else read(test_path)
    rng = random.Random(f"split:{key.removeprefix('data.')}:{seed}")
    train: list[Indexed] = []
    # The part given as a slice is fixed, so it goes first and a count draws from what it leaves.
    if isinstance(config.train, str):
        train = _take(train_rows, config.train, set(), rng, train_key)
    used = {i for i, _ in train} if same else set()
    test = _take(test_rows, config.test, used, rng, test_key)
    if not isinstance(config.train, str):
        used = {i for i, _ in test} if same else set()
        train = _take(train_rows, config.train, used, rng, train_key)
    shared = {i for i, _ in train} & {i for i, _ in test} if same else set()
    if shared:
        raise UserError(
            f"{key}: train {config.train!r} and test {config.test!r} overlap in {len(shared)} rows of "
            f"{config.path}, first {min(shared)}; they must share none"
        )
    train_name, test_name = _names(config.path, test_path, same)
    tables = [train_rows] if same else [train_rows, test_rows]
    return _part(key, kind, tables, _prompts(train_name, train, kind), _prompts(test_name, test, kind))


def task_part(config: TaskConfig, seed: int) -> Part:
    """The test rows of one capability task. Raises `UserError`, for a row without answer too."""
    key = f"data.capability {config.name!r}"
    if config.test == 0:
        raise UserError(f"{key}, test: found 0; allowed: 1 or more rows as a count or a slice")
    rows = load(config.format, _source(config.path, "capability", config))
    where = f"{key} ({config.path})"
    chosen = _take(rows, config.test, set(), random.Random(f"task:{config.name}:{seed}"), where)
    missing = next((i for i, row in chosen if not row.answer), None)
    if missing is not None:
        raise UserError(f"{where}: row {missing} has no answer; a capability task needs one for every prompt")
    return _part(key, "capability", [rows], [], _prompts(Path(config.path).stem, chosen, "capability"))


def _part(key: str, kind: Kind, tables: list[Usable], train: list[Prompt], test: list[Prompt]) -> Part:
    dropped: Counter[str] = Counter()
    for table in tables:
        dropped += table.dropped
    usable = sum(map(len, tables))
    dropped[NOT_ASKED] = usable - len(train) - len(test)
    return Part(key, kind, usable + sum(table.dropped.total() for table in tables), train, test, dropped)


def _source(path: str, kind: Kind, config: SourceConfig | TaskConfig) -> Source:
    return Source(
        path,
        kind,
        config.column,
        config.revision,
        config.hub_split,
        config.hub_config,
        config.answer_column,
        config.hub_folder,
        *((config.wrong, config.only) if isinstance(config, AxisSource) else ()),
    )


def _file(path: str) -> str:
    return os.path.realpath(path) if os.path.exists(path) else path


def refuse_one_file_for_both(harmful: SourceConfig, other: SourceConfig | TaskConfig, key: str) -> None:
    """Raise `UserError` where harmful goals and harmless prompts come from one column of one file.

    An xstest file holds both sides, told apart by its labels.
    """
    if harmful.format == other.format == "xstest":
        return

    def places(config: SourceConfig | TaskConfig) -> set[tuple[str, ...]]:
        paths = {config.path, getattr(config, "test_path", None) or config.path}
        hub = (str(config.hub_config), str(config.hub_folder), config.hub_split, str(config.revision))
        at = (str(config.column), *hub)
        return {(_file(path), at[0]) if os.path.exists(path) else (path, *at) for path in paths}

    if places(harmful) & places(other):
        raise UserError(
            f"data.harmful and {key} read the same file, {other.path}; allowed: one file for both only where format "
            "xstest tells its sides apart, or another column"
        )


def _names(first: str, second: str, same: bool) -> tuple[str, str]:
    """Distinct id prefixes for two files, with the folder where the stems agree (`train/data`, `test/data`)."""
    one, two = Path(first), Path(second)
    if one.stem != two.stem or same:
        return one.stem, two.stem
    return f"{one.parent.name}/{one.stem}", f"{two.parent.name}/{two.stem}"


def _slice(size: int, text: str, where: str) -> range:
    wanted = parse_slice(text)
    # A slice that ends past the file would silently shrink, and every rate's n with it.
    for bound in (wanted.start, wanted.stop):
        if bound is not None and abs(bound) > size:
            raise UserError(f"{where}: slice {text!r} exceeds the {size} usable rows")
    chosen = range(size)[wanted]
    if not chosen:
        raise UserError(f"{where}: slice {text!r} of {size} usable rows is empty")
    # So would one whose step leaves the first row alone.
    if wanted.step is not None and abs(wanted.step) > 1 and len(chosen) == 1:
        raise UserError(f"{where}: slice {text!r} has a step beyond its rows and gives one row; give its bounds alone")
    return chosen


def _count(size: int, count: int, used: set[int], rng: random.Random, where: str) -> list[int]:
    free = [i for i in range(size) if i not in used]
    if count > len(free):
        raise UserError(f"{where}: {count} rows asked, {len(free)} of {size} usable rows are free")
    rng.shuffle(free)
    return free[:count]


def _take(rows: Usable, wanted: int | str, used: set[int], rng: random.Random, where: str) -> list[Indexed]:
    if isinstance(wanted, str):
        return rows.pick(_slice(len(rows), wanted, where))
    return rows.pick(_count(len(rows), wanted, used, rng, where))


def _prompts(source: str, rows: list[Indexed], kind: Kind) -> list[Prompt]:
    return [Prompt(f"{source}:{i}", row.conversation, kind, row.answer, row.wrong) for i, row in rows]
