"""How far a compact edit would move a model's refusals: measured in memory, on the base and on what a run exported.

The attack is directional ablation inside a support (`moe/rank_one.py`): the difference of means between refused
harmful and answered harmless prompts is taken out of what some writers write. Kinds of writers are measured alone and
together, over a growing share of the experts: a repair that leans on one kind of unit shows. The model is whole again
after every edit, byte for byte; no function here, and none that it calls inside an edit, writes weights.

Source: arXiv 2406.11717 (refusal by one direction), arXiv 2606.04160 (attention carries refusal too).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.schema import Prompt
from trainer.detection.counts import count_sides
from trainer.detection.residual import last_token_states
from trainer.detection.scores import score
from trainer.detection.support import ranked_experts, support
from trainer.evaluation import metrics
from trainer.evaluation.clustered import Clusters
from trainer.moe.rank_one import Correction, Unit, corrected
from trainer.moe.writers import KINDS, Kind, Writer, find_writers
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.measure import shown
from trainer.recipe.schema import Recipe
from trainer.reporting.curves import save_robustness
from trainer.run.folder import model_of
from trainer.runtime.console import is_main_process, say, table
from trainer.runtime.files import atomic_write, replacing

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of the routed experts."""
TAKEN_AWAY = 1.0


@dataclass(frozen=True)
class Point:
    """One edit of one model. `share`: of the experts; `parameters`: share of the model's that were touched. Rates as
    in `evaluation.json`.
    """

    model: str
    kinds: list[Kind]
    share: float
    experts: int
    layers: int
    parameters: float
    relative_change: float
    harmful_refusal: dict[str, Any]
    benign_compliance: dict[str, Any]


@dataclass(frozen=True)
class _Refusals:
    """What an attack knows: the refusal direction of every layer, and experts by how much refusing activates them."""

    directions: dict[int, torch.Tensor]
    ranked: list[tuple[int, int]]


def audit(recipe: Recipe, folder: Path, prompts: int) -> None:
    """Measure base and export of a run, show the curves and write `robustness.json` and `robustness.png`.

    Args:
        prompts: test prompts of each kind.

    Raises:
        UserError: the run exported nothing, its data lacks a kind, or a model refuses or answers too little to find a
            direction in.
    """
    for kind in ("harmful", "benign"):
        if getattr(recipe.data, kind) is None:
            raise UserError(f"data.{kind}: missing in the recipe of {folder}, and an audit asks such prompts")
    named = {"base": recipe.model.name_or_path, "repaired": model_of(str(folder))}
    points: list[Point] = []
    for name, path in named.items():
        revision = recipe.model.revision if name == "base" else None
        section = recipe.model.model_copy(update={"name_or_path": path, "revision": revision, "quantization": None})
        points += _curve(Experiment.of(recipe.model_copy(update={"model": section})), name, prompts)
    if not is_main_process():
        return
    _show(points)
    rows = [asdict(point) for point in points]
    atomic_write(folder / "robustness.json", json.dumps(rows, indent=1))
    with replacing(folder / "robustness.png") as temporary:
        save_robustness(rows, temporary)
    say(f"audit: {folder / 'robustness.json'}, {folder / 'robustness.png'}")


def _curve(experiment: Experiment[Any], name: str, prompts: int) -> list[Point]:
    refusals = _refusals(experiment)
    writers, points = find_writers(experiment.backbone), []
    for kinds, share, units in _supports(experiment, refusals, writers):
        correction = Correction(units, refusals.directions, TAKEN_AWAY)
        with corrected(experiment.backbone, writers, [correction]) as extent:
            refused = _rate(experiment, experiment.corpus.harmful.test[:prompts], "harmful_refusal")
            answered = _rate(experiment, experiment.corpus.benign.test[:prompts], "benign_compliance")
        points.append(
            Point(
                name,
                kinds,
                share,
                extent.experts,
                extent.layers,
                extent.parameters / extent.of_parameters,
                extent.relative,
                refused,
                answered,
            )
        )
    return points


def _supports(
    experiment: Experiment[Any], refusals: _Refusals, writers: Sequence[Writer]
) -> list[tuple[list[Kind], float, tuple[Unit, ...]]]:
    """(kinds, share of the experts, units): nothing, every kind alone, all together."""
    present = [kind for kind in KINDS if any(writer.kind == kind for writer in writers)]
    total, directed = experiment.backbone.total_experts, refusals.directions

    def units(kinds: Sequence[Kind], share: float) -> tuple[Unit, ...]:
        return support(refusals.ranked, writers, kinds, max(1, round(share * total)), None, directed)

    found: list[tuple[list[Kind], float, tuple[Unit, ...]]] = [([], 0.0, ())]
    found += [(["experts"], share, units(["experts"], share)) for share in SHARES]
    found += [([kind], 0.0, units([kind], 1.0)) for kind in present if kind != "experts"]
    found += [(present, share, units(present, share)) for share in SHARES if len(present) > 1]
    return found


def _refusals(experiment: Experiment[Any]) -> _Refusals:
    """From training prompts asked plainly."""
    chat, backbone, section = experiment.chat, experiment.backbone, experiment.recipe.evaluate
    groups = {}
    for kind, wanted in (("harmful", "refused"), ("benign", "complied")):
        asked = [prompt.conversation for prompt in getattr(experiment.corpus, kind).train[:128]]
        replies = experiment.ask(asked, f"audit: {kind}", section=section)
        kept = [
            (prompt, said)
            for prompt, said, verdict in zip(asked, replies, experiment.judge(asked, replies), strict=True)
            if verdict == wanted
        ]
        if len(kept) < 2:
            raise UserError(f"data.{kind}: {len(kept)} training prompts are {wanted}; an audit needs 2 of them")
        groups[kind] = kept
    states = [
        last_token_states(backbone, chat, [prompt for prompt, _ in kept], section.batch_size, "audit: states")
        for kept in groups.values()
    ]
    difference_LD = torch.from_numpy(states[0].mean(0) - states[1].mean(0)).double()
    unit_LD = (difference_LD / difference_LD.norm(dim=-1, keepdim=True)).float()
    turns = {f"audit: experts, {kind}": [chat.encode(*turn) for turn in kept] for kind, kept in groups.items()}
    counts = count_sides(backbone, turns, "both", section.batch_size, chat.padding)
    ranked = ranked_experts(score(counts, "aad", "token"), counts.experts, counts.layers)
    return _Refusals(dict(enumerate(unit_LD)), ranked)


def _rate(experiment: Experiment[Any], prompts: Sequence[Prompt], figure: str) -> dict[str, Any]:
    asked = [prompt.conversation for prompt in prompts]
    verdicts = experiment.judge(asked, experiment.ask(asked, f"audit: {figure}", section=experiment.recipe.evaluate))
    rate = metrics.refusal if figure == "harmful_refusal" else metrics.compliance
    clusters = Clusters([prompt.id for prompt in prompts], [None] * len(prompts))
    return rate(verdicts, name=figure, clusters=clusters).as_dict()


def _show(points: Sequence[Point]) -> None:
    rows = [
        [
            point.model,
            " + ".join(point.kinds) or "none",
            f"{point.experts} in {point.layers}",
            f"{point.parameters:.2%}",
            f"{point.relative_change:.3f}",
            shown(point.harmful_refusal),
            shown(point.benign_compliance),
        ]
        for point in points
    ]
    columns = ["model", "edited", "experts, layers", "parameters", "change", "harmful refusal", "harmless compliance"]
    table("directional ablation in memory, at strength 1", columns, rows)
