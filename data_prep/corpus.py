"""Building the corpus of a run: splits that share no row and no text, templates with their roles, and tasks."""

import os
from collections import Counter

from .config import DataConfig, SourceConfig, TaskConfig
from .errors import UserError
from .leaks import count_once, keep_goals_unseen, keep_tests_unseen, near_templates, notes, refuse_both_sides
from .schema import Corpus, Kind, Split, Task
from .sources import Part, refuse_one_file_for_both, source_part, task_part
from .wrappers import load_wrappers

KINDS: tuple[Kind, ...] = ("harmful", "benign", "borderline")


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Everything the recipe's `data` section names; counts are drawn with `seed`.

    Raises:
        UserError: a file that cannot be read, rows that are not there, a text that is harmful and harmless, training
            rows of which test leaves none; names the key, or the file with its row and column.
    """
    given: dict[Kind, SourceConfig] = {kind: found for kind in KINDS if (found := getattr(config, kind)) is not None}
    _refuse_slips(config, given)
    sources = {kind: source_part(kind, source, seed) for kind, source in given.items()}
    tasks = [task_part(task, seed) for task in config.capability]
    parts = [*sources.values(), *tasks]
    for part in parts:
        count_once(part)
    for part in parts if "harmful" in sources else []:
        if part.kind != "harmful":
            refuse_both_sides(sources["harmful"], part)
    keep_tests_unseen(parts)
    if "harmful" in sources and config.near_duplicates is not None:
        keep_goals_unseen(sources["harmful"], parts, config.near_duplicates)
    wrappers = load_wrappers(config.jailbreaks, seed) if config.jailbreaks else []
    said = [note for part in parts for note in notes(part)]
    if config.near_duplicates is not None:
        said += near_templates(wrappers, config.near_duplicates)
    harmful, benign, borderline = (_split(sources.get(kind)) for kind in KINDS)
    return Corpus(
        harmful,
        benign,
        borderline,
        wrappers=wrappers,
        tasks=[Task(task.name, task.metric, part.test) for task, part in zip(config.capability, tasks, strict=True)],
        notes=said,
        rows=[part.count() for part in parts],
    )


def _split(part: Part | None) -> Split:
    return Split(part.train, part.test) if part is not None else Split([], [])


def _refuse_slips(config: DataConfig, given: dict[Kind, SourceConfig]) -> None:
    """What the section's keys say without any file: parts that nothing can be made of."""
    twice = [name for name, n in Counter(task.name for task in config.capability).items() if n > 1]
    if twice:
        raise UserError(f"data.capability: task name {twice[0]!r} is used more than once")
    templates = config.jailbreaks
    if templates and not templates.seen:
        only_measured = bool(templates.unseen or templates.robust)
        dealt = bool(templates.families) and not only_measured
        if not dealt and ("harmful" in given or not only_measured):
            raise UserError("data.jailbreaks.seen: found no selector; allowed: 'group', 'group[0]' or 'group[0:4]'")
    named: dict[str, SourceConfig | TaskConfig] = {f"data.{kind}": source for kind, source in given.items()}
    named |= {f"data.capability {task.name!r}": task for task in config.capability}
    for key, source in named.items():
        _refuse_hub_keys(key, source)
        if "harmful" in given and key != "data.harmful":
            refuse_one_file_for_both(given["harmful"], source, key)


def _refuse_hub_keys(key: str, source: SourceConfig | TaskConfig) -> None:
    """A revision that a local file does not have would stand in the recipe as if it had been read."""
    paths = (source.path, getattr(source, "test_path", None) or source.path)
    if not all(os.path.isfile(path) for path in paths):
        return
    for name in ("revision", "hub_config", "hub_split", "hub_folder"):
        found = getattr(source, name)
        if found != type(source).model_fields[name].default:
            raise UserError(
                f"{key}, {name}: found {found!r} with the local file {source.path}; allowed: with a Hub data set"
            )
