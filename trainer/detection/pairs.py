"""Pairs of one harmful goal: asked plainly and refused (anchor), and inside a jailbreak that succeeded (adversarial).

A pair that fails either test is dropped whole (RASA, section on identification). Nothing harmful is written down:
`pairs.jsonl` quotes ids, verdicts, the model's own refusal and a digest of the adversarial reply.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_prep.errors import UserError
from data_prep.schema import Prompt, Wrapper

Reply = Callable[[Sequence[str], str], list[str]]
"""(prompts, label of the progress bar) -> the model's replies."""


@dataclass(frozen=True)
class Pair:
    """One usable pair. Texts stay in memory."""

    goal: Prompt
    wrapper: Wrapper
    anchor_reply: str
    adversarial_reply: str

    @property
    def adversarial_prompt(self) -> str:
        return self.wrapper.wrap(self.goal.text)


@dataclass
class PairReport:
    """The usable pairs and what became of every goal and candidate pair (the rows of `pairs.jsonl`)."""

    pairs: list[Pair] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Outcome -> rows: anchor_refused, anchor_not_refused of goals; kept, jailbreak_failed, unjudged of pairs."""
        return dict(Counter(str(row["outcome"]) for row in self.rows))

    def jsonl(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)


def build_pairs(
    goals: Sequence[Prompt],
    wrappers: Sequence[Wrapper],
    reply: Reply,
    judge: Callable[[str], str],
    max_pairs: int,
) -> PairReport:
    """Ask every goal plainly, then the refused ones inside jailbreaks, until `max_pairs` usable pairs are found.

    Goals meet the wrappers in turn, so that every goal is used before one is used twice, and families stay balanced.

    Raises:
        UserError: the model refuses no goal, or no jailbreak succeeds; says how many were tried.
    """
    report = PairReport()
    anchors = reply([goal.text for goal in goals], "anchor replies")
    verdicts = [judge(text) for text in anchors]
    refused = [
        (goal, text) for goal, text, verdict in zip(goals, anchors, verdicts, strict=True) if verdict == "refused"
    ]
    for goal, text, verdict in zip(goals, anchors, verdicts, strict=True):
        if verdict == "refused":
            report.rows.append({"goal": goal.id, "outcome": "anchor_refused", "anchor_reply": text})
        else:
            report.rows.append({"goal": goal.id, "outcome": "anchor_not_refused", "verdict": verdict})
    if not refused:
        raise UserError(
            f"no pair survives: the model refuses 0 of {len(goals)} plain harmful goals (data.harmful); "
            "repair needs a model that refuses them when asked plainly"
        )
    candidates = _candidates(refused, wrappers)
    tried = 0
    while len(report.pairs) < max_pairs and tried < len(candidates):
        chunk = candidates[tried : tried + max_pairs - len(report.pairs)]
        tried += len(chunk)
        replies = reply([wrapper.wrap(goal.text) for goal, _, wrapper in chunk], "jailbreak replies")
        for (goal, refusal, wrapper), text in zip(chunk, replies, strict=True):
            verdict = judge(text)
            outcome = {"complied": "kept", "refused": "jailbreak_failed"}.get(verdict, "unjudged")
            row: dict[str, object] = {"goal": goal.id, "wrapper": wrapper.id, "outcome": outcome}
            if outcome == "kept":
                report.pairs.append(Pair(goal, wrapper, refusal, text))
                row["adversarial_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            report.rows.append(row)
    if not report.pairs:
        raise UserError(
            f"no pair survives: 0 of {tried} jailbroken goals were answered ({len(refused)} of {len(goals)} plain "
            f"goals are refused); the wrappers in data.jailbreaks.seen do not work on this model"
        )
    return report


def _candidates(
    refused: Sequence[tuple[Prompt, str]], wrappers: Sequence[Wrapper]
) -> list[tuple[Prompt, str, Wrapper]]:
    """Every goal with every wrapper, once: each goal is used before one is used twice."""
    every = {
        (goal.id, wrapper.id): (goal, text, wrapper)
        for turn in range(len(wrappers))
        for i, (goal, text) in enumerate(refused)
        for wrapper in [wrappers[(i + turn) % len(wrappers)]]
    }
    return list(every.values())
