"""The evidence around a repair: figures before and after, what moved, a random control, the audit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer.console import table
from trainer.evaluation.diagnostics import router_restore_gap, routing_drift
from trainer.export import audit_checkpoint, save_checkpoint
from trainer.loading import load
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.moe.trained import Trained
from trainer.recipe import Recipe
from trainer.run import Run, Stage
from trainer.run_files import atomic_write
from trainer.subject import Subject


def measure(run: Run, name: str, subject: Subject, after: Sequence[Stage] = ()) -> tuple[dict[str, Any], Stage]:
    """Every figure of the contract for the model as it is now; kept in the run folder, so asked once."""
    stage = run.stage(name, subject.hash("evaluate"), after=after)
    folder = run.dir / "stages" / name
    if not stage.done:
        measurement = subject.suite.measure(subject.model, subject.tokenizer, label=name)
        folder.mkdir(parents=True, exist_ok=True)
        measurement.write_verdicts(folder / "verdicts.jsonl")
        atomic_write(folder / "metrics.json", json.dumps(measurement.metrics, indent=1))
        stage.finish([folder])
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics, stage


def diagnose(
    run: Run,
    subject: Subject,
    trained: Trained,
    metrics: dict[str, Any],
    texts: Callable[[], Sequence[tuple[str, str]]],
    after: Sequence[Stage],
) -> dict[str, Any]:
    """Restore gap and routing drift of the repaired model on (prompt, reply) texts."""
    stage = run.stage("diagnose", subject.hash("evaluate"), after=after)
    path = run.dir / "stages" / "diagnose" / "diagnostics.json"
    if not stage.done:
        drift = routing_drift(trained, subject.tokenizer, texts(), subject.recipe.evaluate.batch_size)
        found = {
            "router_restore_gap": router_restore_gap(trained, subject.tokenizer, subject.suite, metrics),
            "topk_flip_rate": sum(layer["flip_rate"] for layer in drift) / len(drift),
            "drift_per_layer": drift,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(found, indent=1))
        stage.finish([path])
    diagnostics: dict[str, Any] = json.loads(path.read_text())
    return diagnostics


def export_and_audit(
    run: Run, subject: Subject, trained: Trained, expert_set: ExpertSet | None, after: Sequence[Stage]
) -> dict[str, Any]:
    """Fuse, write the checkpoint, reload it from disk and prove what moved; `audit.json`.

    Raises:
        RuntimeError: something outside the set moved, or the reloaded checkpoint answers differently. The checkpoint
            is kept for inspection, the stage does not count as done.
    """
    stage = run.stage("export", subject.hash("export"), after=after)
    audit_path, folder = run.dir / "audit.json", run.dir / "model"
    if not stage.done:
        trained.fuse()
        save_checkpoint(subject.model, subject.tokenizer, folder)
        ids = (
            torch.arange(8, device=subject.model.device).unsqueeze(0)
            % subject.model.get_input_embeddings().weight.shape[0]
        )
        with torch.no_grad():
            logits = subject.model(input_ids=ids, use_cache=False).logits
        base, _ = load(subject.recipe.model)
        audit = audit_checkpoint(base, folder, expert_set, logits, ids)
        atomic_write(audit_path, json.dumps(audit, indent=1))
        if audit["moved_outside"] and expert_set is not None:
            raise RuntimeError(f"{folder}: moved outside the expert set and the routers: {audit['moved_outside'][:5]}")
        if not audit["reload_ok"]:
            raise RuntimeError(f"{folder}: reloaded logits differ by {audit['reload_max_logit_difference']:.3g}")
        if not subject.recipe.export.model:
            shutil.rmtree(folder)
        stage.finish([audit_path, *([folder] if subject.recipe.export.model else [])])
    found: dict[str, Any] = json.loads(audit_path.read_text())
    return found


def random_control(
    run: Run,
    subject: Subject,
    expert_set: ExpertSet,
    repair: Callable[[Subject, ExpertSet], object],
    inputs: str,
    after: Sequence[Stage],
) -> dict[str, Any]:
    """The same repair on experts drawn at random, as many in every layer: what the choice of experts is worth."""
    stage = run.stage("control", inputs, after=after)
    path = run.dir / "stages" / "control" / "metrics.json"
    if not stage.done:
        model, _ = load(subject.recipe.model)
        control = replace(subject, backbone=Backbone.of(model).check())
        repair(control, expert_set.random_like(subject.recipe.run.seed))
        metrics = control.suite.measure_asr(model, subject.tokenizer, ("seen", "unseen"), label="random control")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(metrics, indent=1))
        stage.finish([path])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


HEADLINE = (
    "asr_seen",
    "asr_unseen",
    "asr_robust",
    "harmful_refusal",
    "over_refusal",
    "benign_compliance",
    "benign_wrapped_compliance",
    "degenerate",
)


def print_summary(evaluation: dict[str, Any], recipe: Recipe) -> None:
    """The one table at the end of a run."""
    before, after = evaluation["before"], evaluation["after"]
    rows = [[name, _shown(before[name]), _shown(after[name]), after[name]["n"]] for name in HEADLINE if name in after]
    for task in after["capability"]:
        b, a = before["capability"][task], after["capability"][task]
        rows.append([f"capability: {task}", _shown(b), _shown(a), a["n"]])
    diagnostics = evaluation["diagnostics"]
    control = diagnostics["random_control"]
    if control:
        rows.append(
            ["asr_unseen, matched random experts", "", _shown(control["asr_unseen"]), control["asr_unseen"]["n"]]
        )
    for name in ("router_restore_gap", "topk_flip_rate", "gate_weights_changed"):
        rows.append([name, "", f"{diagnostics[name]:.3f}", ""])
    share = diagnostics["experts_changed"] / diagnostics["experts_total"]
    rows.append(
        [
            "experts_changed",
            "",
            f"{diagnostics['experts_changed']} of {diagnostics['experts_total']} ({share:.1%})",
            "",
        ]
    )
    rows.append(["untouched_identical", "", str(diagnostics["untouched_identical"]), ""])
    table(f"{recipe.run.name}: {recipe.model.name_or_path}", ["figure", "before", "after", "n"], rows)


def _shown(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]"
