"""LoMC, step 0: which harmless prompts the model refuses, which it answers, and which harmful ones it refuses.

Kept with ids and verdicts; the replies that are kept are those to harmless prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from data_prep.errors import UserError
from data_prep.schema import Prompt
from trainer.methods.lomc.recipe import LomcRecipe
from trainer.model.reply import Reply, Verdict
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.runtime.console import say
from trainer.runtime.files import atomic_write


@dataclass(frozen=True)
class Asked:
    """A prompt and what the model did; `reply` is None of a harmful prompt."""

    prompt: Prompt
    verdict: Verdict
    reply: Reply | None


@dataclass(frozen=True)
class Groups:
    """`wrong`: harmless and refused. `right`: harmless and answered. `harmful`: harmful and refused, plain or in a
    wrapper.
    """

    wrong: list[Asked]
    right: list[Asked]
    harmful: list[Asked]


@dataclass(frozen=True)
class Halves:
    """`fitted`: prompts that directions are fitted on. `held`: held out, to choose by. Either has every kind."""

    fitted: Groups
    held: Groups

    @classmethod
    def of(cls, found: Groups, held_out: float, seed: int) -> Halves:
        """`held_out`: share of every group."""
        halves = [_halves(group, held_out, seed) for group in (found.wrong, found.right, found.harmful)]
        return cls(Groups(*(fitted for fitted, _ in halves)), Groups(*(held for _, held in halves)))


def groups(experiment: Experiment[LomcRecipe]) -> Step[Halves]:
    """Every kind of training prompt, asked plainly, and each harmful one in a wrapper besides, the wrappers by turns:
    what withstands one is harmful refusal too. The halves are drawn anew whenever they are read.

    Raises:
        UserError: nothing to correct (no harmless prompt, or a single one, is refused), or nothing to keep.
    """
    corpus, section = experiment.corpus, experiment.recipe.detect
    path = experiment.folder / "groups.jsonl"
    of_kind = {
        kind: getattr(corpus, kind).train[: section.max_prompts] for kind in ("borderline", "benign", "harmful")
    }
    wrappers = cycle([*corpus.wrappers_of("seen"), *corpus.wrappers_of("robust")])
    wrapped = [
        replace(goal, id=f"{wrapper.id}|{goal.id}", conversation=wrapper.wrap(goal.conversation))
        for goal, wrapper in zip(of_kind["harmful"], wrappers, strict=False)
    ]
    prompts: list[Prompt] = [prompt for kind in (*of_kind.values(), wrapped) for prompt in kind]

    def make() -> list[Asked]:
        conversations = [prompt.conversation for prompt in prompts]
        replies = experiment.ask(conversations, "replies", section=section)
        verdicts = experiment.judge(conversations, replies)
        return [
            Asked(prompt, verdict, None if prompt.kind == "harmful" else reply)
            for prompt, reply, verdict in zip(prompts, replies, verdicts, strict=True)
        ]

    def write(asked: list[Asked]) -> None:
        atomic_write(path, "".join(json.dumps(_record(one)) + "\n" for one in asked))

    def read() -> Halves:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [
            Asked(prompt, row["verdict"], Reply.of_record(row) if "answer" in row else None)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        recipe = experiment.recipe
        return Halves.of(_grouped(asked), recipe.correct.held_out, recipe.run.seed)

    reads = ["detect.max_prompts", "detect.max_new_tokens", "evaluate.judge", "evaluate.refusal_markers"]
    return experiment.step("groups", make, Kept(write, lambda: [path], read), reads=reads)


def _grouped(asked: Sequence[Asked]) -> Groups:
    harmless = [one for one in asked if one.prompt.kind != "harmful"]
    found = Groups(
        [one for one in harmless if one.verdict == "refused"],
        [one for one in harmless if one.verdict == "complied"],
        [one for one in asked if one.prompt.kind == "harmful" and one.verdict == "refused"],
    )
    say(
        f"groups: {len(found.wrong)} of {len(harmless)} harmless prompts are refused, {len(found.right)} answered; "
        f"{len(found.harmful)} of {len(asked) - len(harmless)} harmful ones refused"
    )
    if len(found.wrong) < 2:
        raise UserError(
            f"nothing to correct: {len(found.wrong)} of {len(harmless)} harmless training prompts (data.borderline, "
            "data.benign) are refused; needed are 2, one to fit a direction on and one to choose its strength"
        )
    for name, group, key in (("answered", found.right, "data.benign"), ("refused", found.harmful, "data.harmful")):
        if len(group) < 2:
            raise UserError(
                f"{key}: {len(group)} training prompts are {name}; needed are 2, or nothing says what to keep"
            )
    return found


def _record(one: Asked) -> dict[str, Any]:
    row = {"prompt": one.prompt.id, "kind": one.prompt.kind, "verdict": one.verdict}
    return row if one.reply is None else row | one.reply.record()


def _halves(group: list[Asked], held_out: float, seed: int) -> tuple[list[Asked], list[Asked]]:
    shuffled = list(group)
    random.Random(seed).shuffle(shuffled)
    cut = min(max(round(held_out * len(shuffled)), 1), len(shuffled) - 1)
    return shuffled[cut:], shuffled[:cut]
