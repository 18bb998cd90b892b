"""LoMC, steps 1 and 2: the directions along which harmless prompts are refused, and the support that may be edited."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from trainer.detection import prototypes
from trainer.detection.counts import Counts, count_sides
from trainer.detection.prototypes import GRID, LayerDirection, layer_directions
from trainer.detection.residual import last_token_states
from trainer.detection.scores import score
from trainer.detection.selection import resolve_k
from trainer.detection.support import ranked_experts, support
from trainer.methods.lomc.groups import Asked, Groups, Halves
from trainer.methods.lomc.recipe import LomcDetectSection, LomcRecipe
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.rank_one import Unit
from trainer.moe.writers import KINDS, Kind, Writer, find_writers
from trainer.pipeline.detected import FILES, write_detected
from trainer.pipeline.experiment import Experiment, Kept, Step
from trainer.runtime.console import say
from trainer.runtime.files import atomic_write, save_tensors

Directions = dict[int, Tensor]
"""Decoder layer -> unit vector [D]."""


@dataclass(frozen=True)
class Located:
    """`several`: number of prototypes -> the aggregated direction of each layer; `plain`: the plain difference of
    means, orthogonalised. `ranked`: (decoder layer, expert), best first. `units`: the support, in layers that have a
    direction whatever the number. `writers`: all that the model has. `about`: for the report.
    """

    several: dict[int, Directions]
    plain: Directions
    ranked: list[tuple[int, int]]
    units: tuple[Unit, ...]
    writers: list[Writer]
    about: dict[str, Any]


def identify(experiment: Experiment[LomcRecipe], grouped: Step[Halves]) -> Step[Located]:
    """Directions and support, from the half of the prompts that nothing is held out of.

    Raises:
        UserError: fewer wrongly refused prompts than clusters, a budget that does not fit the model, or directions
            that are all collinear with harmful refusal.
    """
    recipe, backbone = experiment.recipe, experiment.backbone
    section = recipe.detect
    k = resolve_k(section.top_k, backbone.total_experts, None, len(backbone))
    names = ("directions.safetensors", "support.json", *FILES)
    tensors, about, *_ = files = [experiment.folder / name for name in names]
    writers = find_writers(backbone)

    def make() -> tuple[Located, Counts, NDArray[np.float64]]:
        fitted, held = grouped.value.fitted, grouped.value.held
        several, plain, facts = _directions(experiment, fitted, held)
        counts = _counts(experiment, fitted)
        scores_LE = score(counts, section.score, "token")
        ranked = ranked_experts(scores_LE, counts.experts, counts.layers)
        units = support(ranked, writers, section.kinds, k, section.layers, _directed(several))
        if not units:
            raise UserError(
                f"detect.kinds: {section.kinds}: the model has no such writers in the layers of the support"
            )
        return Located(several, plain, ranked, units, writers, facts), counts, scores_LE

    def write(made: tuple[Located, Counts, NDArray[np.float64]]) -> None:
        located, counts, scores_LE = made
        named = {str(number): found for number, found in located.several.items()} | {"plain": located.plain}
        save_tensors(tensors, {f"{name}.{i}": d for name, found in named.items() for i, d in found.items()})
        content = {"units": located.units, "ranked": located.ranked, "about": located.about}
        atomic_write(about, json.dumps(content, indent=1))
        experts = _expert_set(experiment, located.units, counts, scores_LE)
        write_detected(experiment.folder, counts.scored(scores_LE), experts)

    def read() -> Located:
        content, held = json.loads(about.read_text(encoding="utf-8")), load_file(tensors)
        found: dict[str, Directions] = {"plain": {}}
        for at, direction_D in held.items():
            name, _, layer = at.partition(".")
            found.setdefault(name, {})[int(layer)] = direction_D
        plain = found.pop("plain")
        units = tuple(Unit(*unit) for unit in content["units"])
        ranked = [(layer, expert) for layer, expert in content["ranked"]]
        several = {int(number): directions for number, directions in found.items()}
        return Located(several, plain, ranked, units, writers, content["about"])

    reads = ["detect", "correct.held_out"]
    return experiment.step("detect", make, Kept(write, lambda: files, read), reads=reads, after=[grouped])


def units_of(experiment: Experiment[LomcRecipe], located: Located, kinds: Sequence[Kind]) -> tuple[Unit, ...]:
    """The support with other kinds of writers, under the same budget."""
    section, backbone = experiment.recipe.detect, experiment.backbone
    k = resolve_k(section.top_k, backbone.total_experts, None, len(backbone))
    return support(located.ranked, located.writers, kinds, k, section.layers, _directed(located.several))


def _directed(several: dict[int, Directions]) -> set[int]:
    return set.intersection(*(set(directions) for directions in several.values()))


def everywhere(writers: Sequence[Writer], backbone: Any, directed: Directions) -> tuple[Unit, ...]:
    """Every writer of every kind, in the layers that have a direction."""
    size = {layer.index: layer.num_experts for layer in backbone}
    return tuple(
        Unit(w.layer, w.kind, expert)
        for w in writers
        if w.layer in directed
        for expert in (range(size[w.layer]) if w.is_fused else [None])
    )


def _directions(
    experiment: Experiment[LomcRecipe], fitted: Groups, held: Groups
) -> tuple[dict[int, Directions], Directions, dict[str, Any]]:
    section, seed = experiment.recipe.detect, experiment.recipe.run.seed
    states, held_states = _states(experiment, fitted), _states(experiment, held)
    numbers = _numbers(section)
    if section.clustering == "kmeans" and max(numbers) > len(fitted.wrong):
        raise UserError(
            f"detect.prototypes: found {max(numbers)}, but directions are fitted on {len(fitted.wrong)} wrongly "
            "refused prompts; allowed: at most as many"
        )
    tried = {n: layer_directions(states, held_states, n, section.clustering, section.protected, seed) for n in numbers}
    plain = layer_directions(states, held_states, 1, "kmeans", section.protected, seed)
    several = {number: found for number, layers in tried.items() if (found := _unit_vectors(layers))}
    if not several or not _directed(several):
        raise UserError(
            "detect: every direction of wrong refusals is collinear with harmful refusal, so correcting it would cost "
            "harmful refusals; nothing can be corrected on this model"
        )
    for number, layers in tried.items():
        dropped = [i for i, layer in enumerate(layers) if layer.direction_D is None]
        say(
            f"detect: {number} prototypes; held-out AUC by layer "
            + ", ".join("-" if layer.auc is None else f"{layer.auc:.2f}" for layer in layers)
            + (f"; no direction in layers {dropped}: collinear with harmful refusal" if dropped else "")
        )
    say(
        "detect: cosine of wrong refusal with harmful refusal by layer "
        + ", ".join(f"{layer.cosine:.2f}" for layer in plain)
    )
    facts = {
        "fitted": {"wrong": len(fitted.wrong), "right": len(fitted.right), "harmful": len(fitted.harmful)},
        "held_out": {"wrong": len(held.wrong), "right": len(held.right), "harmful": len(held.harmful)},
        "clustering": section.clustering,
        "layers": [
            {
                "layer": i,
                "cosine": plain[i].cosine,
                "prototypes": [
                    {"number": number, "kept": len(at[i].shares), "dropped": at[i].dropped, "auc": at[i].auc}
                    for number, at in tried.items()
                ],
            }
            for i in range(len(plain))
        ],
    }
    return several, _unit_vectors(plain), facts


def directions_of(experiment: Experiment[LomcRecipe], fitted: Groups, held: Groups) -> dict[int, Directions]:
    """Number of prototypes -> the direction of each layer, for the model as it is now. Empty where a group has no
    prompts left to fit on or to choose by, or every direction is collinear with harmful refusal.
    """
    if not all(group for of in (fitted, held) for group in (of.wrong, of.right, of.harmful)):
        return {}
    section, seed = experiment.recipe.detect, experiment.recipe.run.seed
    states, held_states = _states(experiment, fitted), _states(experiment, held)
    numbers = [number for number in _numbers(section) if number <= len(fitted.wrong)]
    tried = {n: layer_directions(states, held_states, n, section.clustering, section.protected, seed) for n in numbers}
    return {number: found for number, layers in tried.items() if (found := _unit_vectors(layers))}


def _numbers(section: LomcDetectSection) -> list[int]:
    return [GRID**2] if section.clustering == "som" else section.prototypes


def _states(experiment: Experiment[LomcRecipe], of: Groups) -> prototypes.Groups:
    def read(asked: list[Asked], label: str) -> NDArray[np.float64]:
        conversations = [one.prompt.conversation for one in asked]
        batch_size = experiment.recipe.detect.batch_size
        return last_token_states(experiment.backbone, experiment.chat, conversations, batch_size, label).astype(float)

    return prototypes.Groups(
        read(of.wrong, "wrongly refused"), read(of.right, "answered"), read(of.harmful, "refused")
    )


def _unit_vectors(layers: Sequence[LayerDirection]) -> Directions:
    return {
        i: torch.from_numpy(layer.direction_D).float()
        for i, layer in enumerate(layers)
        if layer.direction_D is not None
    }


def _counts(experiment: Experiment[LomcRecipe], fitted: Groups) -> Counts:
    """Activations on wrongly refused prompts against those on answered ones, each with the model's own reply."""
    chat, section, backbone = experiment.chat, experiment.recipe.detect, experiment.backbone

    turns = {
        label: [chat.encode(one.prompt.conversation, one.reply) for one in asked if one.reply is not None]
        for label, asked in (("wrongly refused", fitted.wrong), ("answered", fitted.right))
    }
    return count_sides(backbone, turns, section.tokens, section.batch_size, chat.padding)


def _expert_set(
    experiment: Experiment[LomcRecipe], units: Sequence[Unit], counts: Counts, scores_LE: NDArray[np.float64]
) -> ExpertSet:
    row = {layer: i for i, layer in enumerate(counts.layers)}
    members = [
        Member(unit.layer, unit.expert, float(scores_LE[row[unit.layer], unit.expert]))
        for unit in units
        if unit.expert is not None
    ]
    others = {kind: [u.layer for u in units if u.kind == kind] for kind in KINDS if kind != "experts"}
    about: dict[str, object] = {"score": experiment.recipe.detect.score, "besides": others}
    sizes = dict(zip(counts.layers, counts.experts, strict=True))
    return ExpertSet(tuple(members), sizes, experiment.recipe.model.name_or_path, about)
