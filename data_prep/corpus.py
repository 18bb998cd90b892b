"""Building the corpus of a run: splits that share no row and no text, templates with their roles, and tasks."""

import random
from collections import Counter
from pathlib import Path

from .config import DataConfig, SourceConfig, TaskConfig, parse_slice
from .errors import UserError
from .loaders import Loaded, Source, load
from .schema import Conversation, Corpus, Kind, Prompt, Split, Task
from .wrappers import load_wrappers

Indexed = tuple[int, Loaded]


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Everything the recipe's `data` section names; counts are drawn with `seed`. Raises `UserError`."""
    notes: list[str] = []
    return Corpus(
        harmful=_split("harmful", config.harmful, seed, notes),
        benign=_split("benign", config.benign, seed, notes),
        borderline=_split("borderline", config.borderline, seed, notes),
        wrappers=load_wrappers(config.jailbreaks) if config.jailbreaks else [],
        tasks=_tasks(config.capability, seed),
        notes=notes,
    )


def normalised(text: str) -> str:
    """The text as compared across train and test: lower case, without punctuation, single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _stem(path: str) -> str:
    return Path(path).stem


def _names(first: str, second: str) -> tuple[str, str]:
    """Distinct id prefixes for two files, with the folder where the stems agree (`train/data`, `test/data`)."""
    if _stem(first) != _stem(second) or first == second:
        return _stem(first), _stem(second)
    return f"{Path(first).parent.name}/{_stem(first)}", f"{Path(second).parent.name}/{_stem(second)}"


def _slice(rows: list[Loaded], text: str, where: str) -> list[Indexed]:
    wanted = parse_slice(text)
    # A slice that ends past the file would silently shrink, and every rate's n with it.
    for bound in (wanted.start, wanted.stop):
        if bound is not None and abs(bound) > len(rows):
            raise UserError(f"{where}: slice {text!r} exceeds the {len(rows)} usable rows")
    chosen = list(enumerate(rows))[wanted]
    if not chosen:
        raise UserError(f"{where}: slice {text!r} of {len(rows)} usable rows is empty")
    return chosen


def _count(rows: list[Loaded], count: int, used: set[int], rng: random.Random, where: str) -> list[Indexed]:
    free = [i for i in range(len(rows)) if i not in used]
    if count > len(free):
        raise UserError(f"{where}: {count} rows asked, {len(free)} of {len(rows)} usable rows are free")
    rng.shuffle(free)
    return [(i, rows[i]) for i in free[:count]]


def _take(rows: list[Loaded], wanted: int | str, used: set[int], rng: random.Random, where: str) -> list[Indexed]:
    return _slice(rows, wanted, where) if isinstance(wanted, str) else _count(rows, wanted, used, rng, where)


def _split(name: str, config: SourceConfig | None, seed: int, notes: list[str]) -> Split:
    if config is None:
        return Split([], [])

    def read(path: str) -> list[Loaded]:
        at = (config.revision, config.hub_split, config.hub_config)
        return load(config.format, Source(path, kind, config.column, *at))

    kind: Kind = name  # type: ignore[assignment]
    train_rows = read(config.path)
    same = config.test_path is None or config.test_path == config.path
    test_path = config.test_path or config.path
    test_rows = train_rows if same else read(test_path)
    rng = random.Random(f"split:{name}:{seed}")
    train: list[Indexed] = []
    # The part given as a slice is fixed, so it goes first and a count draws from what it leaves.
    if isinstance(config.train, str):
        train = _take(train_rows, config.train, set(), rng, f"data.{name}.train ({config.path})")
    used = {i for i, _ in train} if same else set()
    test = _take(test_rows, config.test, used, rng, f"data.{name}.test ({test_path})")
    if not isinstance(config.train, str):
        used = {i for i, _ in test} if same else set()
        train = _take(train_rows, config.train, used, rng, f"data.{name}.train ({config.path})")
    shared = {i for i, _ in train} & {i for i, _ in test} if same else set()
    if shared:
        raise UserError(
            f"data.{name}: train {config.train!r} and test {config.test!r} overlap in {len(shared)} rows of "
            f"{config.path}, first {min(shared)}; they must share none"
        )
    tested = {normalised(row.text) for _, row in test}
    kept = [(i, row) for i, row in train if normalised(row.text) not in tested]
    if len(kept) < len(train):
        notes.append(f"data.{name}: {len(train) - len(kept)} training rows dropped, their text is also in test")
    if train and not kept:
        raise UserError(f"data.{name}: every one of the {len(train)} training rows is also in test")
    train_name, test_name = _names(config.path, test_path)
    return Split(_prompts(train_name, kept, kind), _prompts(test_name, test, kind))


def _prompts(source: str, rows: list[Indexed], kind: Kind) -> list[Prompt]:
    return [Prompt(f"{source}:{i}", Conversation.of(row.text), kind, row.answer) for i, row in rows]


def _tasks(configs: list[TaskConfig], seed: int) -> list[Task]:
    twice = [name for name, n in Counter(c.name for c in configs).items() if n > 1]
    if twice:
        raise UserError(f"data.capability: task name {twice[0]!r} is used more than once")
    tasks = []
    for config in configs:
        where = f"data.capability {config.name!r} ({config.path})"
        at = (config.revision, config.hub_split, config.hub_config)
        source = Source(config.path, "capability", config.column, *at)
        rows = load(config.format, source)
        chosen = _take(rows, config.test, set(), random.Random(f"task:{config.name}:{seed}"), where)
        missing = next((i for i, row in chosen if not row.answer), None)
        if missing is not None:
            raise UserError(f"{where}: row {missing} has no answer; a capability task needs one for every prompt")
        tasks.append(Task(config.name, config.metric, _prompts(_stem(config.path), chosen, "capability")))
    return tasks
