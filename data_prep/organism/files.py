"""The organism's data files, in the formats that any recipe reads."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import tasks, world
from .frames import template_groups

PARTS = {"harmful": (240, 200), "benign": (400, 200), "borderline": (240, 160)}
TASK_ROWS = 120


def rows(kind: str, seed: int, over_refusal: bool = False) -> list[dict[str, str]]:
    """The rows of a kind: its train rows, then its test rows (`PARTS`), all texts distinct.

    Harmful test rows use forbidden pairs that neither the train rows nor the organism's own training use. Harmful rows
    hold no answer; the others hold this world's, those too that an organism with planted over-refusal refuses.
    """
    seen: set[str] = set()
    out = []
    for part, count in zip(("train", "test"), PARTS[kind], strict=True):
        rng = random.Random(f"rows:{kind}:{part}:{seed}")
        pairs = world.theme_pairs(part, seed)
        draw: dict[str, Callable[[], world.Request]] = {
            "harmful": partial(world.harmful, rng, pairs),
            "benign": partial(world.benign, rng),
            "borderline": partial(world.borderline, rng, over_refusal),
        }
        for request in _distinct(draw[kind], count, seen):
            row = {"prompt": request.text, "part": part}
            out.append(row if kind == "harmful" else row | {"answer": request.answer})
    return out


def _distinct(draw: Callable[[], world.Request], count: int, seen: set[str]) -> list[world.Request]:
    found: list[world.Request] = []
    while len(found) < count:
        request = draw()
        if request.text not in seen:
            seen.add(request.text)
            found.append(request)
    return found


def task_rows(task: str, seed: int) -> list[dict[str, str]]:
    """`TASK_ROWS` distinct questions of a capability task with their answers."""
    rng = random.Random(f"rows:{task}:{seed}")
    found: dict[str, str] = {}
    while len(found) < TASK_ROWS:
        question, answer = tasks.question(task, rng)
        found[question] = answer
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def write(folder: Path, seed: int, over_refusal: bool = False) -> None:
    """Write `harmful|benign|borderline.jsonl`, `capability_<task>.jsonl` and `templates.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in PARTS:
        _write_jsonl(folder / f"{kind}.jsonl", rows(kind, seed, over_refusal))
    for task in tasks.TASKS:
        _write_jsonl(folder / f"capability_{task}.jsonl", task_rows(task, seed))
    (folder / "templates.json").write_text(json.dumps(template_groups(), indent=1) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
