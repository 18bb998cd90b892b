"""What a model does on every axis: the rate of right behaviour on held-out prompts, asked plainly.

Replies are judged and forgotten; what is kept of each is whether it was right, in the order of the prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from transformers import PreTrainedModel

from data_prep.same_text import normalised
from data_prep.schema import Prompt
from trainer.evaluation.answers import matches
from trainer.evaluation.generation import reply
from trainer.evaluation.metrics import from_flags, from_verdicts
from trainer.methods.alignx.axes import Axis
from trainer.methods.alignx.mixture import Mixture
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.pipeline.experiment import Experiment, JsonFile, Step

Rates = dict[str, Any]
"""{"rates": {axis: R}, "right": {axis: [whether each reply was right]}}."""
ASKED = ("max_new_tokens", "batch_size", "judge", "refusal_markers")
"""Keys of `evaluate` that replies on the axes depend on."""
READS = ["axes", "adapters", *(f"evaluate.{key}" for key in ASKED)]


def measure_axes(
    experiment: Experiment[AlignxRecipe],
    axes: Sequence[Axis],
    name: str,
    after: Sequence[Step[Any]],
    *,
    model: Mixture | None = None,
    under: Callable[[], AbstractContextManager[None]] = nullcontext,
    reads: Sequence[str] = (),
) -> Step[Rates]:
    """The step `axes-<name>`: every axis' test prompts asked of a model, or of the run's own under a context."""

    def make() -> Rates:
        with under():
            return ask(experiment, axes, cast(PreTrainedModel, model or experiment.model), name)

    kept = JsonFile(experiment.folder / "axes" / f"{name}.json")
    return experiment.step(f"axes-{name}", make, kept, reads=[*READS, *reads], after=after)


def ask(experiment: Experiment[AlignxRecipe], axes: Sequence[Axis], model: PreTrainedModel, label: str) -> Rates:
    """All axes in one pass, sorted by length."""
    section = experiment.recipe.evaluate
    prompts = [prompt for axis in axes for prompt in axis.rows.test]
    asked = [prompt.conversation for prompt in prompts]
    replies = reply(
        model,
        experiment.chat,
        asked,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        label=f"axes: {label}",
    )
    rates, right, start = dict[str, Any](), dict[str, list[bool]](), 0
    for axis in axes:
        end = start + len(axis.rows.test)
        said = replies[start:end]
        if axis.section.judge == "answer":
            hits = [matches(r.text, p.answer or "") for r, p in zip(said, axis.rows.test, strict=True)]
            rate = from_flags(hits, name=axis.name)
        elif axis.section.judge == "closer":
            hits = [is_closer(r.text, p) for r, p in zip(said, axis.rows.test, strict=True)]
            rate = from_flags(hits, name=axis.name)
        else:
            verdicts = experiment.judge(asked[start:end], said)
            hits = [verdict == axis.section.judge for verdict in verdicts]
            rate = from_verdicts(verdicts, axis.section.judge, False, name=axis.name)
        rates[axis.name], right[axis.name], start = rate.as_dict(), hits, end
    return {"rates": rates, "right": right}


def is_closer(text: str, prompt: Prompt) -> bool:
    """Whether a reply shares more words with the right answer than with any wrong one (F1 of the words).

    As TruthfulQA's ROUGE-1 comparison (arXiv 2109.07958), of one right answer.
    """
    return _f1(text, prompt.answer or "") > max((_f1(text, wrong) for wrong in prompt.wrong), default=0.0)


def _f1(text: str, other: str) -> float:
    said, wanted = (Counter(normalised(part).split()) for part in (text, other))
    return 2 * (said & wanted).total() / max(said.total() + wanted.total(), 1)


def mean_rate(rates: Mapping[str, Any]) -> float:
    """Average over the axes, each of the same weight."""
    return sum(found["rate"] for found in rates.values()) / len(rates)


def drops(
    steps: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any], last: Mapping[str, str], order: str
) -> dict[str, dict[str, float]]:
    """Forgetting: {axis A: {axis B: what is lost on A under B's adapter}}, from the rates after each step.

    Args:
        last: axis -> its last step, in the order of training.
        order: parallel: B's adapter knows nothing of A's, so the loss is from the base on. chain: of every B after A,
            the loss is from A's own adapter on.
    """
    names, found = list(last), dict[str, dict[str, float]]()
    for number, a in enumerate(names):
        others = names[number + 1 :] if order == "chain" else [b for b in names if b != a]
        before = steps[last[a]][a] if order == "chain" else base[a]
        found[a] = {b: before["rate"] - steps[last[b]][a]["rate"] for b in others}
    return found
