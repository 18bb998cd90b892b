"""Pairs of one harmful goal: asked plainly and refused (anchor), and inside a jailbreak that succeeded (adversarial).

A pair that fails either test is dropped whole (RASA, section on identification). Nothing harmful is written down:
`pairs.jsonl` quotes ids, verdicts, the model's own refusal (text and tokens) and a digest of the adversarial reply.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.schema import Conversation, Prompt, Wrapper
from trainer.model.reply import Ask, Judge, Reply
from trainer.runtime.console import say


@dataclass(frozen=True)
class Pair:
    """One usable pair. Texts stay in memory."""

    goal: Prompt
    wrapper: Wrapper
    anchor_reply: Reply
    adversarial_reply: Reply

    @property
    def adversarial_prompt(self) -> Conversation:
        return self.wrapper.wrap(self.goal.conversation)


@dataclass
class PairReport:
    """The usable pairs and what became of every goal and candidate pair (the rows of `pairs.jsonl`)."""

    pairs: list[Pair] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Outcome -> rows: anchor_refused, anchor_not_refused of goals; kept, jailbreak_failed, unjudged of pairs, and
        surplus: usable, but more than were wanted.
        """
        return dict(Counter(str(row["outcome"]) for row in self.rows))

    def jsonl(self) -> str:
        """The text of `pairs.jsonl`; `read_pairs` reads it."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)


def read_pairs(path: Path) -> tuple[dict[str, Reply], list[tuple[str, str]]]:
    """From `pairs.jsonl`: goal id -> the model's refusal, and the (goal id, wrapper id) of every pair kept.

    Adversarial replies are not in the file, so whole pairs cannot be read back.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    refusals = {row["goal"]: _refusal(row) for row in rows if row["outcome"] == "anchor_refused"}
    return refusals, [(row["goal"], row["wrapper"]) for row in rows if row["outcome"] == "kept"]


def _anchor_row(goal: Prompt, refusal: Reply) -> dict[str, object]:
    return {
        "goal": goal.id,
        "outcome": "anchor_refused",
        "anchor_reply": refusal.text,
        "anchor_ids": refusal.ids,
        "anchor_finished": refusal.finished,
    }


def _refusal(row: dict[str, Any]) -> Reply:
    ids = row["anchor_ids"]
    return Reply(row["anchor_reply"], None if ids is None else tuple(ids), row["anchor_finished"])


def build_pairs(
    goals: Sequence[Prompt],
    wrappers: Sequence[Wrapper],
    ask: Ask,
    judge: Judge,
    max_pairs: int,
    tries_per_pair: int,
) -> PairReport:
    """Ask every goal plainly, then the refused ones inside jailbreaks, until `max_pairs` usable pairs are found.

    Goals meet the wrappers in turn, so that every goal is used before one is used twice, and families stay balanced.
    Each time as many are asked as the success so far makes necessary, so that rare successes cost few calls.

    Args:
        tries_per_pair: times `max_pairs`: the most jailbreaks asked. Where they do not suffice, a line says so.

    Raises:
        UserError: the model refuses no goal, or no jailbreak succeeds; says how many were tried.
    """
    report = PairReport()
    plain = [goal.conversation for goal in goals]
    anchors = ask(plain, "anchor replies")
    refused = []
    for goal, reply, verdict in zip(goals, anchors, judge(plain, anchors), strict=True):
        if verdict == "refused":
            refused.append((goal, reply))
            report.rows.append(_anchor_row(goal, reply))
        else:
            report.rows.append({"goal": goal.id, "outcome": "anchor_not_refused", "verdict": verdict})
    if not refused:
        raise UserError(
            f"no pair survives: the model refuses 0 of {len(goals)} plain harmful goals (data.harmful); "
            "repair needs a model that refuses them when asked plainly"
        )
    candidates = _candidates(refused, wrappers)
    budget = min(len(candidates), tries_per_pair * max_pairs)
    tried = usable = 0
    while usable < max_pairs and tried < budget:
        chunk = candidates[tried : min(budget, tried + _needed(max_pairs - usable, usable, tried))]
        tried += len(chunk)
        wrapped = [wrapper.wrap(goal.conversation) for goal, _, wrapper in chunk]
        replies = ask(wrapped, "jailbreak replies")
        for (goal, refusal, wrapper), reply, verdict in zip(chunk, replies, judge(wrapped, replies), strict=True):
            outcome = {"complied": "kept", "refused": "jailbreak_failed"}.get(verdict, "unjudged")
            usable += outcome == "kept"
            outcome = "surplus" if outcome == "kept" and usable > max_pairs else outcome
            row: dict[str, object] = {"goal": goal.id, "wrapper": wrapper.id, "outcome": outcome}
            if outcome == "kept":
                report.pairs.append(Pair(goal, wrapper, refusal, reply))
                row["adversarial_sha256"] = hashlib.sha256(reply.text.encode()).hexdigest()
            report.rows.append(row)
    if usable < max_pairs and budget < len(candidates):
        say(
            f"pairs: {usable} of {max_pairs} after {tried} jailbreaks ({usable / tried:.1%} succeed), the most that "
            f"detect.tries_per_pair={tries_per_pair} allows"
        )
    if not report.pairs:
        raise UserError(
            f"no pair survives: 0 of {tried} jailbroken goals were answered ({len(refused)} of {len(goals)} plain "
            f"goals are refused); the wrappers in data.jailbreaks.seen do not work on this model"
        )
    return report


def _needed(missing: int, usable: int, tried: int) -> int:
    """Jailbreaks to ask for `missing` pairs, at the rate so far; before any is known, or at none, as many again."""
    return math.ceil(missing * tried / usable) if usable else max(missing, tried)


def _candidates(
    refused: Sequence[tuple[Prompt, Reply]], wrappers: Sequence[Wrapper]
) -> list[tuple[Prompt, Reply, Wrapper]]:
    """Every goal with every wrapper, once: each goal is used before one is used twice."""
    every = {
        (goal.id, wrapper.id): (goal, reply, wrapper)
        for turn in range(len(wrappers))
        for i, (goal, reply) in enumerate(refused)
        for wrapper in [wrappers[(i + turn) % len(wrappers)]]
    }
    return list(every.values())
