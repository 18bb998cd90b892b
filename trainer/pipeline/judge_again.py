"""A second judge on the replies that a run kept, or any judge on replies that people labelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from data_prep.errors import UserError
from data_prep.json_lines import read_json_lines
from data_prep.schema import Conversation
from trainer.evaluation.agreement import VERDICTS, agreement
from trainer.evaluation.judges.judge import judge_of
from trainer.evaluation.paired import read_verdicts
from trainer.evaluation.suite import JudgedReply, judged_metrics
from trainer.model.reply import Reply, Verdict
from trainer.pipeline.measure import HEADLINE, shown
from trainer.pipeline.replies import measurements, read_replies
from trainer.recipe.errors import one_line
from trainer.recipe.section import Section
from trainer.recipe.sections import EvaluateSection
from trainer.recipe.yaml import apply_overrides
from trainer.run.manifest import Manifest
from trainer.runtime.console import is_main_process, say, table
from trainer.runtime.files import atomic_write

JUDGES_FILE = "judges.json"
AGREEMENT = ("n", "agree", "kappa", "unjudged by the first", "by the second")
NOT_ASKED = "[a request that is not part of this file]"


class _Only(Section):
    evaluate: EvaluateSection


def judge_section(name: str, overrides: Sequence[str]) -> EvaluateSection:
    """The section of a judge: its name, and `evaluate.guard.format=...` and the like.

    Raises:
        UserError: an unknown judge or key, or a judge whose own section is missing.
    """
    tree: dict[str, Any] = {"evaluate": {"judge": name}}
    keys = apply_overrides(tree, overrides)
    try:
        return _Only.model_validate(tree).evaluate
    except ValidationError as error:
        raise UserError(one_line(error, _Only, "--with", keys)) from error


def judge_again(run: Path, section: EvaluateSection) -> dict[str, Any]:
    """Grade a run's kept replies with the judge of `section`, show how far it agrees with the run's own, and how the
    figures change; written to `judges.json`, by the judge's name.

    Raises:
        UserError: no run, none of whose replies were kept, or a judge that cannot be built or reached.
    """
    first = Manifest.read(run).recipe.get("evaluate", {}).get("judge", "phrases")
    judge, found, rows = judge_of(section), {}, []
    for label, path in measurements(run).items():
        kept = read_replies(path)
        _refuse_another_measurement(run, label, [one.row for one in kept])
        verdicts = judge([one.asked for one in kept], [one.reply for one in kept])
        agreed = agreement([one.row.verdict for one in kept], verdicts)
        again = judged_metrics([replace(one.row, verdict=v) for one, v in zip(kept, verdicts, strict=True)])
        found[label] = {"agreement": agreed, "first": judged_metrics([one.row for one in kept]), "second": again}
        rows.append([label, *_cells(agreed)])
    table(f"{first} and {section.judge} on the same replies", ["measurement", *AGREEMENT], rows)
    for label, one in found.items():
        figures = [name for name in HEADLINE if name in one["first"]]
        lines = [[name, shown(one["first"][name]), shown(one["second"][name])] for name in figures]
        table(f"{label}, by both judges", ["figure", first, section.judge], lines)
    if is_main_process():
        path = run / JUDGES_FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        atomic_write(path, json.dumps(known | {_name(section): found}, indent=1))
        say(f"written: {path}")
    return found


def _refuse_another_measurement(run: Path, label: str, rows: Sequence[JudgedReply]) -> None:
    """A measurement that was made again without keeping replies leaves the former ones behind."""
    verdicts = run / "stages" / label / "verdicts.jsonl"
    if verdicts.is_file() and read_verdicts(verdicts) != list(rows):
        raise UserError(
            f"{run}: the replies of {label} are of another measurement than its verdicts; allowed: those of a run "
            "with --keep-replies, from its start on (--force)"
        )


def judge_labelled(path: Path, section: EvaluateSection) -> dict[str, Any]:
    """How far a judge agrees with the labels of a file (`reply`, `verdict`; `prompt` and `kind` where it has them).

    Raises:
        UserError: a row without a reply or with an unknown verdict; names file and line.
    """
    rows = [(f"{path}, line {number}", row) for number, row in read_json_lines(path)]
    if not rows:
        raise UserError(f"{path}: holds no rows")
    for where, row in rows:
        if not isinstance(row.get("reply"), str) or row.get("verdict") not in VERDICTS:
            raise UserError(f"{where}: expected 'reply', a text, and 'verdict', one of {', '.join(VERDICTS)}")
    labels = [cast(Verdict, row["verdict"]) for _, row in rows]
    asked = [Conversation.of(str(row.get("prompt") or NOT_ASKED)) for _, row in rows]
    verdicts = judge_of(section)(asked, [Reply.written(row["reply"]) for _, row in rows])
    found = {"all": agreement(labels, verdicts)}
    kinds = [str(row.get("kind", "")) for _, row in rows]
    for kind in dict.fromkeys(kind for kind in kinds if kind):
        of_kind = [i for i, other in enumerate(kinds) if other == kind]
        found[kind] = agreement([labels[i] for i in of_kind], [verdicts[i] for i in of_kind])
    columns = ["replies", "n", "accuracy", "kappa", "labelled unjudged", "left unjudged"]
    table(f"{section.judge} against the labels of {path.name}", columns, ([k, *_cells(v)] for k, v in found.items()))
    missed = [str(row.get("id", i)) for i, (_, row) in enumerate(rows) if verdicts[i] != labels[i]]
    say(f"missed: {', '.join(missed) or 'none'}")
    return found


def _cells(agreed: dict[str, Any]) -> list[object]:
    kappa, counted = agreed["kappa"], agreed["table"]
    return [
        agreed["n"],
        f"{agreed['agree']:.3f}",
        "" if kappa is None else f"{kappa:.3f}",
        sum(counted["unjudged"].values()),
        sum(counted[first]["unjudged"] for first in VERDICTS),
    ]


def _name(section: EvaluateSection) -> str:
    model = section.guard.name_or_path if section.judge == "guard" and section.guard else None
    model = section.endpoint.model if section.judge == "endpoint" and section.endpoint else model
    return section.judge if model is None else f"{section.judge} {model}"
