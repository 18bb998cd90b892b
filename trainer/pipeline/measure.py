"""Figures before and after an edit, what moved besides them, and the one table at the end of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from data_prep.schema import Conversation
from trainer.evaluation import paired
from trainer.evaluation.diagnostics import router_restore_gap, routing_drift
from trainer.evaluation.suite import Measurement
from trainer.model.reply import Reply
from trainer.moe.trainable import TrainableModel
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.replies import keep_as, say_what_is_missing
from trainer.recipe.schema import Recipe
from trainer.recipe.sections import ModelSection
from trainer.reporting.figures import mostly_cut
from trainer.run.folder import model_of
from trainer.run.step import JsonFile, Kept, Step
from trainer.runtime.console import say, table
from trainer.runtime.files import atomic_write

R = TypeVar("R", bound=Recipe)
Figures = dict[str, Any]
"""M of `evaluation.json`, or a part of it."""


def measure(
    experiment: Experiment[Any],
    name: str,
    after: Sequence[Step[Any]] = (),
    reads: Sequence[str] = (),
    *,
    model: PreTrainedModel | None = None,
) -> Step[Figures]:
    """Every figure of the suite for the model as it is now; kept in the run folder, so asked once.

    Args:
        model: asked instead of the experiment's own.
    """
    asked = experiment.model if model is None else model
    folder = experiment.folder / "stages" / name
    metrics, verdicts = folder / "metrics.json", folder / "verdicts.jsonl"

    def write(measured: Measurement) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        measured.write_verdicts(verdicts)
        atomic_write(metrics, json.dumps(measured.metrics, indent=1))

    def read() -> Figures:
        found: Figures = json.loads(metrics.read_text())
        return found

    step = experiment.step(
        name,
        lambda: experiment.suite.measure(asked, experiment.chat, label=name),
        Kept(write, lambda: [folder], read),
        reads=["evaluate", *reads],
        after=after,
    )
    if experiment.suite.keep is not None:
        say_what_is_missing(experiment.folder, name)
    return step


def measure_alone(recipe: Recipe, model_or_run: str, replies: Path | None = None) -> Figures:
    """The figures of a recipe's data and evaluation on another model, or on a run's.

    `replies`: a file to keep the judged replies in; nothing else is kept.
    """
    model = ModelSection(
        name_or_path=model_of(model_or_run),
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
        system_prompt=recipe.model.system_prompt,
        chat_template_kwargs=recipe.model.chat_template_kwargs,
    )
    # Only the result goes to standard output, so that it can be piped.
    with redirect_stdout(sys.stderr):
        keep = None if replies is None else keep_as(replies)
        experiment = Experiment.of(recipe.model_copy(update={"model": model}), keep=keep)
        return experiment.suite.measure(experiment.model, experiment.chat, label="evaluate").metrics


def changes(experiment: Experiment[Any]) -> dict[str, Any]:
    """What `evaluate-before` and `evaluate-after` differ in, answer by answer; empty for a run without these steps."""
    return changes_in(experiment.folder)


def changes_in(folder: Path) -> dict[str, Any]:
    """The same of a run folder."""
    files = [folder / "stages" / f"evaluate-{side}" / "verdicts.jsonl" for side in ("before", "after")]
    if not all(file.is_file() for file in files):
        return {}
    return paired.changes(*map(paired.read_verdicts, files))


def diagnose(
    experiment: Experiment[Any],
    trained: TrainableModel,
    metrics: Figures,
    texts: Callable[[], Sequence[tuple[Conversation, Reply]]],
    after: Sequence[Step[Any]],
) -> Figures:
    """Restore gap and routing drift of the repaired model on (prompt, reply) turns."""

    def make() -> Figures:
        drift = routing_drift(trained, experiment.chat, texts(), experiment.recipe.evaluate.batch_size)
        return {
            "router_restore_gap": router_restore_gap(trained, experiment.chat, experiment.suite, metrics),
            "topk_flip_rate": sum(layer["flip_rate"] for layer in drift) / len(drift),
            "drift_per_layer": drift,
        }

    kept = JsonFile(experiment.folder / "stages" / "diagnose" / "diagnostics.json")
    return dict(experiment.step("diagnose", make, kept, reads=["evaluate"], after=after).value)


def control(
    experiment: Experiment[Any],
    name: str,
    repaired: Callable[[], Experiment[Any]],
    reads: Sequence[str],
    after: Sequence[Step[Any]],
    *,
    whole: bool = False,
) -> Figures:
    """Figures of the same repair on something else, to compare with; kept as the step `name`.

    Args:
        repaired: a fresh copy of the model, repaired there.
        whole: every figure, else attack success alone.
    """

    def make() -> Figures:
        other = repaired()
        if whole:
            return other.suite.measure(other.model, other.chat, label=name).metrics
        return other.suite.measure_asr(other.model, other.chat, ("seen", "unseen"), label=name)

    kept = JsonFile(experiment.folder / "stages" / name / "metrics.json")
    return dict(experiment.step(name, make, kept, reads=reads, after=after).value)


# --- the table at the end of a run -----------------------------------------------------------------

HEADLINE = (
    "asr_seen",
    "asr_unseen",
    "asr_robust",
    "harmful_refusal",
    "over_refusal",
    "benign_compliance",
    "benign_wrapped_compliance",
    "degenerate",
    "finished",
    "finished_benign",
)


def print_figures(recipe: Recipe, columns: dict[str, Figures], more: Sequence[Sequence[object]] = ()) -> None:
    """One row a figure, one column a model (the last one's n is shown), then rows of other figures."""
    last = list(columns.values())[-1]
    rows: list[Sequence[object]] = [
        [name, *(shown(found[name]) if name in found else "" for found in columns.values()), last[name]["n"]]
        for name in HEADLINE
        if name in last
    ]
    for task in last.get("capability", {}):
        rates = [found["capability"][task] for found in columns.values()]
        rows.append([f"capability: {task}", *map(shown, rates), rates[-1]["n"]])
    for part, wording in (("all", "tokens of a reply"), ("benign", "tokens of a reply, harmless")):
        of = [found.get("reply_tokens", {}).get(part) for found in columns.values()]
        if of[-1]:
            rows.append(
                [wording, *(f"{one['mean']:.1f}, median {one['median']:g}" if one else "" for one in of), of[-1]["n"]]
            )
    table(f"{recipe.run.name}: {recipe.model.name_or_path}", ["figure", *columns, "n"], [*rows, *more])
    for name, found in columns.items():
        if (cut := mostly_cut(found)) is not None:
            limit = f"evaluate.max_new_tokens = {recipe.evaluate.max_new_tokens}"
            say(f"caution: {name}: {limit} cuts {cut[0]} of {cut[1]} replies; figures do not see what comes later")


def shown(rate: dict[str, Any]) -> str:
    """A rate with its interval."""
    low, high = rate["ci95"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]"
