"""SteerMoE: detect behaviour-linked experts and steer them at inference (arXiv 2509.09660).

    1. Count on paired inputs how often each expert is active: x1 shows the wanted behaviour, x2 the opposite.
    2. Rank all experts by their risk difference; the top ones are activated (A+) or deactivated (A-).
    3. Force them in and out of every token's top-k while the model runs. Nothing is trained.

docs/steermoe.md says how to use the result and what we add: a graded strength, a gate on the input, the controls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.errors import UserError
from trainer.detection.ranking import Ranking, rank
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.steering_file import SteeringFile
from trainer.pipeline.experiment import Subject
from trainer.pipeline.measure import HEADLINE, measure
from trainer.pipeline.steer import (
    Detected,
    controls,
    detect_experts,
    gate_of,
    perplexity,
    proof,
    selected,
    sizes,
    steering,
    sweep,
)
from trainer.recipe.schema import Recipe
from trainer.reporting import html, plots
from trainer.run.folder import Run, Stage
from trainer.runtime.console import is_main_process, say, table
from trainer.runtime.files import atomic_write, replacing, sha256, sha256_text

PROOF_PROMPTS = 16


def run(recipe: Recipe, run: Run) -> None:
    """The whole method, from the base model to `steering.json` and its evidence."""
    subject = Subject.of(recipe)
    steered = identify(subject, run)
    before, _ = measure(run, "evaluate-before", subject)
    how, gate = steered.file.steering, steered.file.gate
    with steering(subject, how, gate):
        after, measured = measure(run, "evaluate-after", subject, [steered.stage])
    ungated = after
    if gate:
        with steering(subject, how):
            ungated, _ = measure(run, "evaluate-ungated", subject, [steered.stage])
    found = diagnose(run, subject, steered, [measured])
    found["steering"]["ungated"] = ungated
    if recipe.evaluate.random_control:
        found |= controls(run, subject, steered.ranking, how, [steered.stage])
    found["steering"]["sweep"] = sweep(run, subject, steered.ranking, gate, [steered.stage])
    evaluation = {"before": before, "after": after, "diagnostics": found}
    if is_main_process():
        atomic_write(run.dir / "evaluation.json", json.dumps(evaluation, indent=1))
        print_summary(evaluation, recipe)
        say(f"report: {html.write(run.dir)}")
    say(f"steering: {run.dir / 'steering.json'}")


def detect(recipe: Recipe, run: Run) -> None:
    """Steps 1 and 2 alone: up to `steering.json`, with the activations and the heat map."""
    identify(Subject.of(recipe), run)
    say(f"steering: {run.dir / 'steering.json'}")


def export(recipe: Recipe, run: Run) -> None:
    """Steering changes no weight, so there is no checkpoint to write.

    Raises:
        UserError: always; names the file to use instead.
    """
    raise UserError(f"{run.dir}: a steermoe run has no checkpoint; its result is {run.dir / 'steering.json'}")


# --- 1. and 2. detection --------------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """The steering that was found, the ranking behind it and the stage that made both."""

    file: SteeringFile
    ranking: Ranking
    stage: Stage


def identify(subject: Subject, run: Run) -> Steered:
    """Pairs, activation counts, ranking, the gate. Kept in the run folder; unsafe replies are not."""
    recipe = subject.recipe
    section = recipe.steer
    files = [
        run.dir / name
        for name in ("pairs.jsonl", "activations.parquet", "expert_set.json", "steering.json", "expert_set.png")
    ]
    stage = run.stage("detect", _inputs(subject))
    if not stage.done:
        found = detect_experts(subject)
        selection = selected(subject, found.ranking, section.n_pos, section.n_neg)
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
            subject.backbone,
            selection.steering(section.strength),
            model=recipe.model.name_or_path,
            revision=recipe.model.revision,
            per_layer_cap=section.per_layer_cap,
            gate=gate_of(subject) if section.gate else None,
            about=about,
        )
        delta = found.ranking.delta
        members = [Member(*named, delta[named]) for named in (*selection.activate, *selection.deactivate)]
        experts = ExpertSet(tuple(members), sizes(subject), recipe.model.name_or_path, about)
        if is_main_process():
            _write(files, found, experts, file)
        say(f"detect: {len(selection.activate)} experts to activate, {len(selection.deactivate)} to deactivate")
        stage.finish(files)
    ranking = rank(pd.read_parquet(files[1]), reverse=section.reverse)
    return Steered(SteeringFile.load(files[3]), ranking, stage)


def _inputs(subject: Subject) -> str:
    """Hash of what detection reads; the sweep, which it does not read, may change without it."""
    keys = ("contrast", "pairs", "table", "refusal", "unsafe", "n_pos", "n_neg", "reverse", "per_layer_cap")
    sections = ("detect", "evaluate.refusal_markers", *(f"steer.{key}" for key in (*keys, "strength", "gate")))
    files = [Path(path) for path in (subject.recipe.steer.pairs, subject.recipe.steer.table) if path]
    return sha256_text(subject.hash(*sections) + "".join(sha256(path) for path in files))


def _write(files: list[Path], found: Detected, experts: ExpertSet, file: SteeringFile) -> None:
    pairs, activations, expert_set, steering_json, heat_map = files
    atomic_write(pairs, found.pairs.jsonl())
    with replacing(activations) as temporary:
        found.table.to_parquet(temporary, index=False)
    atomic_write(expert_set, experts.to_json())
    atomic_write(steering_json, file.to_json())
    plots.save_heat_map(found.table, experts.pairs, heat_map)


# --- 3. what steering did -------------------------------------------------------------------------


def diagnose(run: Run, subject: Subject, steered: Steered, after: list[Stage]) -> dict[str, Any]:
    """Proof from recorded routing, and fluency: perplexity of the replies under the original model."""
    stage = run.stage("diagnose", subject.hash("steer", "evaluate"), after=after)
    path = run.dir / "stages" / "diagnose" / "diagnostics.json"
    if not stage.done:
        how, corpus = steered.file.steering, subject.corpus
        wrapper = corpus.wrappers_of("seen")[0]
        shown = [wrapper.wrap(goal.text) for goal in corpus.harmful.train[:PROOF_PROMPTS]]
        evidence = proof(subject, how, shown)
        if how.strength == 1.0 and not evidence["forced"]:
            raise RuntimeError("steering: an expert to activate did not run, or one to deactivate did")
        benign = [prompt.text for prompt in corpus.benign.test]
        found = {
            "topk_flip_rate": evidence.pop("topk_flip_rate"),
            "steering": {
                "strength": how.strength,
                **evidence,
                "gate": steered.file.gate.about if steered.file.gate else None,
                "perplexity": {
                    "before": perplexity(subject, None, None, benign),
                    "after": perplexity(subject, how, steered.file.gate, benign),
                },
            },
        }
        stage.finish_json(path, found)
    diagnostics: dict[str, Any] = json.loads(path.read_text())
    return diagnostics


def print_summary(evaluation: dict[str, Any], recipe: Recipe) -> None:
    """The tables at the end of a run."""
    before, after, found = evaluation["before"], evaluation["after"], evaluation["diagnostics"]
    ungated = found["steering"]["ungated"]
    capability = {f"capability: {task}": (m["capability"][task] for m in (before, ungated, after)) for task in
                  after["capability"]}  # fmt: skip
    rows: list[list[object]] = [
        [name, *(_shown(m[name]) for m in (before, ungated, after)), after[name]["n"]]
        for name in HEADLINE
        if name in after
    ]
    rows += [[name, *map(_shown, rates), ""] for name, rates in capability.items()]
    fluency = found["steering"]["perplexity"]
    rows.append(["perplexity of replies", f"{fluency['before']:.2f}", "", f"{fluency['after']:.2f}", ""])
    table(f"{recipe.run.name}: {recipe.model.name_or_path}", ["figure", "before", "ungated", "after", "n"], rows)
    if "bottom_control" in found:
        sets = {f"random {i}": metrics for i, metrics in enumerate(found["random_draws"])}
        sets["bottom"] = found["bottom_control"]
        rows = [[name, _shown(m["asr_seen"]), _shown(m["asr_unseen"])] for name, m in sets.items()]
        table("controls, as many experts", ["set", "asr_seen", "asr_unseen"], rows)
    measured = [row for row in found["steering"]["sweep"] if "metrics" in row]
    if measured:
        names = ["asr_seen", "asr_unseen", "over_refusal", "benign_compliance", "degenerate"]
        rows = [
            [
                *(row[key] for key in ("n_pos", "n_neg", "strength", "gated")),
                *(f"{row['metrics'][name]['rate']:.3f}" for name in names),
                f"{row['perplexity']:.2f}",
            ]
            for row in measured
        ]
        table("sweep", ["n_pos", "n_neg", "strength", "gated", *names, "perplexity"], rows)


def _shown(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]"
