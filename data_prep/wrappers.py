"""Jailbreak templates: selecting them from a file by role, and recombining them into training wrappers."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

from .cells import text_of
from .config import JailbreakConfig, parse_slice
from .errors import UserError, unknown
from .json_lines import parse_json, read_text
from .same_text import normalised
from .schema import Role, Wrapper
from .tables import Row, Source, Table, shown

SELECTOR = re.compile(r"^(?P<group>[^\[\]]+)(?:\[(?P<pick>[^\[\]]+)\])?$")
SENTENCE_END = re.compile(r"(?<=[.!?:\n])\s+")
TEMPLATE_COLUMNS = ("text", "template", "prompt")
# A group's name stands in ids, figures and reports: it must not be a template's text.
LONGEST_NAME = 60


def load_wrappers(config: JailbreakConfig) -> list[Wrapper]:
    """The selected templates in the order seen, unseen, robust; a template's id is `<file>:<group>[<i>]`.

    Raises `UserError` for an absent group, an index outside it, a template without the placeholder or in two roles.
    """
    groups = read_templates(config.path)
    stem = Path(config.path).stem
    wrappers: list[Wrapper] = []
    roles: dict[str, tuple[str, Role]] = {}
    selectors: tuple[tuple[Role, list[str]], ...] = (
        ("seen", config.seen),
        ("unseen", config.unseen),
        ("robust", config.robust),
    )
    for role, chosen in selectors:
        for selector in chosen:
            for group, i in _select(groups, selector, f"data.jailbreaks.{role}", config.path):
                wrapper = Wrapper(f"{stem}:{group}[{i}]", f"{group}[{i}]", role, groups[group][i], config.placeholder)
                earlier = roles.setdefault(normalised(wrapper.text), (wrapper.id, role))
                if earlier != (wrapper.id, role):
                    raise UserError(
                        f"{config.path}: template {wrapper.id} ({role}) is the same as {earlier[0]} ({earlier[1]}); "
                        "a template may have one role, once"
                    )
                if wrapper not in wrappers:
                    wrappers.append(wrapper)
    return wrappers


def read_templates(path: str) -> dict[str, list[str]]:
    """`{group: [template, ...]}` of a JSON object, or of a table's text column (by its group column or the stem)."""
    if Path(path).suffix == ".json" and os.path.isfile(path):
        data = parse_json(read_text(Path(path)), path)
        if isinstance(data, dict):
            return _checked_groups(path, data)
    rows = Table(Source(path, "harmful"))
    column = rows.require_one(TEMPLATE_COLUMNS)
    groups: dict[str, list[str]] = {}
    for row in rows:
        name = text_of(row, "group") or Path(path).stem
        groups.setdefault(_named(name, row.where), []).append(text_of(row, column))
    return groups


def _checked_groups(path: str, data: dict[str, object]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for number, (name, templates) in enumerate(data.items()):
        where = f"{path}, group {''.join(shown([name])) or number}"
        if not isinstance(templates, list):
            raise UserError(f"{where}: must be a list of template strings, found {type(templates).__name__}")
        checked: list[str] = []
        for i, text in enumerate(templates):
            if not isinstance(text, str):
                raise UserError(f"{where}, template {i}: found {type(text).__name__}, expected text")
            # Checked as a cell is, and kept to the last space: its edges may be part of the jailbreak.
            text_of(Row({"text": text}, f"{where}, template {i}"), "text")
            checked.append(text)
        groups[_named(name, where)] = checked
    if not any(groups.values()):
        raise UserError(f"{path} holds no templates")
    return groups


def _named(name: str, where: str) -> str:
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable() or set("[]") & set(name):
        raise UserError(f"{where}: a group's name has 1 to {LONGEST_NAME} printable characters, without [ and ]")
    return name


def _select(groups: dict[str, list[str]], selector: str, key: str, path: str) -> Iterator[tuple[str, int]]:
    found = SELECTOR.match(selector.strip())
    if found is None:
        raise UserError(f"{key}: {selector!r} is no selector; expected 'group', 'group[0]' or 'group[0:4]'")
    group, pick = found["group"], found["pick"]
    if group not in groups:
        raise unknown(f"template group of {path} in {key}", group, shown(groups) or ["(no group with a short name)"])
    size = len(groups[group])
    if pick is None:
        chosen = range(size)
    elif re.fullmatch(r"-?\d+", pick):
        index = int(pick)
        if not -size <= index < size:
            raise UserError(f"{key}: {selector!r} is outside group {group!r}, which has {size} templates")
        chosen = range(index % size, index % size + 1)
    else:
        try:
            part = parse_slice(pick)
        except ValueError as error:
            raise UserError(f"{key}: {selector!r}: {error}") from error
        if any(bound is not None and abs(bound) > size for bound in (part.start, part.stop)):
            raise UserError(f"{key}: {selector!r} exceeds group {group!r}, which has {size} templates")
        chosen = range(size)[part]
    if not chosen:
        raise UserError(f"{key}: {selector!r} selects no template")
    for i in chosen:
        yield group, i


def recombine(wrappers: list[Wrapper], contexts: list[str], n: int, seed: int) -> list[Wrapper]:
    """`n` training wrappers made of the sentences of `wrappers` and, as harmless surroundings, of `contexts`.

    They teach a model to find the goal whatever stands around it, instead of recognising a template. Each is as long
    as a number of words drawn evenly between 8 and half as much again as the longest template, filled with one kind
    of material: sentences of one template or of all, harmless contexts, loose spans of words, or a mixture. The goal
    stands at the start, at the end or in between, sometimes in a carrying sentence of a template or in quotes. Same
    arguments, same result. All have family `recombined` and role `seen`. Raises `UserError` without wrappers or when
    their placeholders differ.
    """
    if not wrappers:
        raise UserError("recombining needs at least one jailbreak wrapper, found none")
    placeholders = {wrapper.placeholder for wrapper in wrappers}
    if len(placeholders) > 1:
        raise UserError(f"recombined wrappers must share one placeholder, found {len(placeholders)}")
    placeholder = placeholders.pop()
    rng = random.Random(f"recombine:{seed}")
    usable = [text.strip() for text in contexts if text.strip() and placeholder not in text]
    material = _Material([_sentences(wrapper) for wrapper in wrappers], usable)
    carriers = [part for wrapper in wrappers for part in SENTENCE_END.split(wrapper.text) if placeholder in part]
    longest = max(len(wrapper.text.split()) for wrapper in wrappers)
    made = []
    for i in range(n):
        parts = material.fill(rng, rng.randint(8, max(9, longest * 3 // 2)))
        drawn = rng.random()
        goal = rng.choice(carriers) if drawn < 0.3 else f'"{placeholder}"' if drawn < 0.45 else placeholder
        parts.insert(rng.choice((0, len(parts), len(parts), rng.randint(0, len(parts)))), goal)
        made.append(Wrapper(f"recombined:{i}", "recombined", "seen", " ".join(parts), placeholder))
    return made


class _Material:
    """What recombined wrappers are filled with: sentences by template, and harmless contexts (may be empty)."""

    def __init__(self, templates: list[list[str]], contexts: list[str]) -> None:
        self.templates = [sentences for sentences in templates if sentences]
        self.contexts = contexts
        self.sentences = [sentence for sentences in self.templates for sentence in sentences]

    def fill(self, rng: random.Random, words: int) -> list[str]:
        """Parts of at least `words` words in all; empty where there is no material at all."""
        own = rng.sample(one, len(one)) if self.templates and (one := rng.choice(self.templates)) else []
        kind = rng.choice(("template", "sentences", "contexts", "mixed", "spans"))
        parts: list[str] = []
        while self.sentences and sum(len(part.split()) for part in parts) < words:
            now = rng.choice(("sentences", "contexts", "spans")) if kind == "mixed" else kind
            if now == "template" and own:
                parts.append(own.pop())
            elif now == "contexts" and self.contexts:
                parts.append(rng.choice(self.contexts))
            elif now == "spans":
                source = rng.choice(self.contexts if self.contexts and rng.random() < 0.3 else self.sentences).split()
                start = rng.randrange(len(source))
                parts.append(" ".join(source[start : start + rng.randint(2, 15)]))
            else:
                parts.append(rng.choice(self.sentences))
        return parts


def _sentences(wrapper: Wrapper) -> list[str]:
    """The template's sentences with the placeholder and the quotes around it taken out."""
    bare = wrapper.text
    for quoted in (f'"{wrapper.placeholder}"', f"'{wrapper.placeholder}'", wrapper.placeholder):
        bare = bare.replace(quoted, "\n")
    parts = (part.strip() for line in bare.split("\n") for part in SENTENCE_END.split(line))
    return [part for part in parts if any(c.isalnum() for c in part)]
