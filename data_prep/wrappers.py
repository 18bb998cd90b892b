"""Jailbreak templates with their roles: selected from a file and from the families, or dealt."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .config import JailbreakConfig, parse_slice
from .errors import UserError, unknown
from .families import FAMILIES, GOAL, Template
from .same_text import normalised
from .schema import Role, Wrapper
from .tables import shown
from .template_files import read_templates

SELECTOR = re.compile(r"^(?P<group>[^\[\]]+)(?:\[(?P<pick>[^\[\]]+)\])?$")


def load_wrappers(config: JailbreakConfig, seed: int) -> list[Wrapper]:
    """The selected templates in the order seen, unseen, robust; a template's id is `<file>:<group>[<i>]`.

    Without a selector every family and group is dealt whole: one third, and one at least, is only measured.
    Raises `UserError` for an absent group, an index outside it, a template without the placeholder or in two roles, a
    family of ours in two roles.
    """
    groups = _groups(config)
    wrappers: list[Wrapper] = []
    roles: dict[tuple[object, ...], tuple[str, Role]] = {}
    for role, chosen in _selectors(config, groups, seed):
        for selector in chosen:
            for group, i in _select(groups, selector, f"data.jailbreaks.{role}", config.path or "the families"):
                wrapper = groups[group][i](role, config.placeholder)
                earlier = roles.setdefault(_as_compared(wrapper), (wrapper.id, role))
                if earlier != (wrapper.id, role):
                    raise UserError(
                        f"{config.path or 'data.jailbreaks'}: template {wrapper.id} ({role}) is the same as "
                        f"{earlier[0]} ({earlier[1]}); a template may have one role, once"
                    )
                if wrapper not in wrappers:
                    wrappers.append(wrapper)
    _refuse_family_in_two_roles(wrappers)
    return wrappers


Made = Callable[[Role, str], Wrapper]
"""(role, placeholder) -> the wrapper of a template."""


def _groups(config: JailbreakConfig) -> dict[str, list[Made]]:
    groups: dict[str, list[Made]] = {}
    if config.path is not None:
        stem = Path(config.path).stem
        for name, templates in read_templates(config.path, config.placeholder).items():
            groups[name] = [_of_file(stem, name, i, template) for i, template in enumerate(templates)]
    for name in FAMILIES if "all" in config.families else config.families:
        if name in groups:
            raise UserError(f"data.jailbreaks: {name!r} is a family and a group of {config.path}; rename the group")
        groups[name] = [_of_family(name, i, template) for i, template in enumerate(FAMILIES[name])]
    return groups


def _of_file(stem: str, group: str, i: int, template: Template) -> Made:
    return lambda role, placeholder: Wrapper(
        f"{stem}:{group}[{i}]",
        f"{group}[{i}]",
        role,
        template.text,
        placeholder,
        template.before,
        template.opening,
    )


def _of_family(name: str, i: int, template: Template) -> Made:
    # One placeholder for all templates of a run, so that these can be recombined with the file's.
    return lambda role, placeholder: Wrapper(
        f"families:{name}[{i}]",
        name,
        role,
        template.text.replace(GOAL, placeholder),
        placeholder,
        template.before,
        template.opening,
        template.encoding,
    )


def _selectors(
    config: JailbreakConfig, groups: dict[str, list[Made]], seed: int
) -> tuple[tuple[Role, list[str]], ...]:
    seen, unseen = config.seen, config.unseen
    if config.families and not (seen or unseen or config.robust):
        if len(groups) < 2:
            raise UserError(
                f"data.jailbreaks.families: found {len(groups)}; allowed: two or more, of which some are only measured"
            )
        drawn = random.Random(f"families:{seed}").sample(sorted(groups), len(groups))
        held_out = set(drawn[: max(1, len(groups) // 3)])
        seen, unseen = [g for g in groups if g not in held_out], [g for g in groups if g in held_out]
    return ("seen", seen), ("unseen", unseen), ("robust", config.robust)


def _as_compared(wrapper: Wrapper) -> tuple[object, ...]:
    turns = tuple((turn.role, normalised(turn.text)) for turn in wrapper.before)
    return turns, normalised(wrapper.text), normalised(wrapper.opening), wrapper.encoding


def _refuse_family_in_two_roles(wrappers: list[Wrapper]) -> None:
    """Templates of one family of ours resemble each other: one that is trained says what the others look like."""
    roles: dict[str, Role] = {}
    for wrapper in wrappers:
        if wrapper.family in FAMILIES and roles.setdefault(wrapper.family, wrapper.role) != wrapper.role:
            raise UserError(
                f"data.jailbreaks: family {wrapper.family!r} is both {roles[wrapper.family]} and {wrapper.role}; "
                "allowed: one role for a whole family"
            )


def _select(groups: dict[str, list[Made]], selector: str, key: str, path: str) -> Iterator[tuple[str, int]]:
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
