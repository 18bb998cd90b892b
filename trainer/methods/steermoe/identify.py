"""SteerMoE, steps 1 and 2: paired counts, the ranking, the experts to force. Unsafe replies are not kept."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from trainer.detection.ranking import Ranking, rank
from trainer.methods.steermoe.recipe import SteermoeRecipe
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.steering_file import SteeringFile
from trainer.pipeline.detected import FILES, write_detected
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.pipeline.steer import Detected, detect_experts, gate_of, selected, sizes
from trainer.runtime.console import say
from trainer.runtime.files import atomic_write

READS = (
    "detect",
    "evaluate.judge",
    "evaluate.refusal_markers",
    *(f"steer.{key}" for key in ("contrast", "pairs", "table", "refusal", "unsafe", "n_pos", "n_neg", "reverse")),
    *(f"steer.{key}" for key in ("per_layer_cap", "strength", "gate")),
)
"""All keys but those of the sweep, which may change without detecting again."""


@dataclass(frozen=True)
class Steered:
    """The steering that was found, and the ranking behind it."""

    file: SteeringFile
    ranking: Ranking


Found = tuple[Detected, ExpertSet, SteeringFile]


def identify(experiment: Experiment[SteermoeRecipe]) -> Step[Steered]:
    """Count, rank, choose, and fit the gate where one is asked for.

    Raises:
        UserError: no usable pair, a file that does not fit, fewer experts of a sign than asked for.
    """
    names = ("pairs.jsonl", "steering.json", *FILES)
    pairs, steering_json, activations, *_ = files = [experiment.folder / name for name in names]

    def write(made: Found) -> None:
        found, experts, file = made
        atomic_write(pairs, found.pairs.jsonl())
        atomic_write(steering_json, file.to_json())
        write_detected(experiment.folder, found.table, experts)

    def read() -> Steered:
        ranking = rank(pd.read_parquet(activations), reverse=experiment.recipe.steer.reverse)
        return Steered(SteeringFile.load(steering_json), ranking)

    return experiment.step("detect", lambda: _find(experiment), Kept(write, lambda: files, read), reads=READS)


def _find(experiment: Experiment[SteermoeRecipe]) -> Found:
    recipe = experiment.recipe
    section = recipe.steer
    found = detect_experts(experiment, section, recipe.detect)
    selection = selected(experiment, section, found.ranking, section.n_pos, section.n_neg)
    if selection.warning():
        say(selection.warning())
    about: dict[str, object] = {
        "method": "steermoe",
        "contrast": section.contrast,
        "table": section.table,
        "n_pos": section.n_pos,
        "n_neg": section.n_neg,
        "reverse": section.reverse,
        "dropped": [list(named) for named in selection.dropped],
    }
    file = SteeringFile.of(
        experiment.backbone,
        selection.steering(section.strength),
        model=recipe.model.name_or_path,
        revision=recipe.model.revision,
        per_layer_cap=section.per_layer_cap,
        gate=gate_of(experiment, recipe.detect) if section.gate else None,
        about=about,
    )
    delta = found.ranking.delta
    members = [Member(*named, delta[named]) for named in (*selection.activate, *selection.deactivate)]
    experts = ExpertSet(tuple(members), sizes(experiment), recipe.model.name_or_path, about)
    say(f"detect: {len(selection.activate)} experts to activate, {len(selection.deactivate)} to deactivate")
    return found, experts, file
