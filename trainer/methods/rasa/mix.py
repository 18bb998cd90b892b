"""RASA, between steps 1 and 2: the rows that are trained on; the original model's answers stay in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data_prep.schema import Conversation
from trainer.methods.rasa.identify import Critical
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.model.reply import Reply
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.runtime.files import atomic_write
from trainer.training.rows import Answer, Answered, Mix, repair_rows

READS = (
    *(
        f"repair.{kind}"
        for kind in ("recombined", "robust", "anchors", "wrapped_benign", "plain_benign", "borderline")
    ),
    "detect.max_new_tokens",
    "evaluate.judge",
    "evaluate.refusal_markers",
)


def mixed(experiment: Experiment[RasaRecipe], critical: Step[Critical]) -> Step[Mix]:
    """The rows of the repair; answers that were given before are read back. The experiment's model is the original.

    Raises as `repair_rows`.
    """
    path = experiment.folder / "answers.jsonl"

    def rows(answered: Answered) -> Mix:
        found, recipe = critical.value, experiment.recipe
        return repair_rows(found.targets, found.refusals, experiment.corpus, recipe.repair, answered, recipe.run.seed)

    def make() -> list[Answer]:
        given: list[Answer] = []

        def ask(prompts: Sequence[Conversation]) -> list[Answer]:
            replies = experiment.ask(prompts, "answers to retain", section=experiment.recipe.detect)
            verdicts = experiment.judge(prompts, replies)
            given.extend(Answer(*answer) for answer in zip(replies, verdicts, strict=True))
            return given

        rows(ask)
        return given

    def write(given: list[Answer]) -> None:
        rows = (answer.reply.record() | {"verdict": answer.verdict} for answer in given)
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))

    def read() -> Mix:
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return rows(lambda prompts: [Answer(Reply.of_record(row), row["verdict"]) for row in kept])

    return experiment.step("answers", make, Kept(write, lambda: [path], read), reads=READS, after=[critical])
