"""The evidence around a repair: figures before and after, what moved, a random control, the audit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.evaluation.diagnostics import router_restore_gap, routing_drift
from trainer.model.load import load
from trainer.model.weight_files import local_folder
from trainer.moe.expert_set import ExpertSet
from trainer.moe.experts import SplitModel
from trainer.moe.quantised import fuse_into, is_quantised
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import Trained
from trainer.pipeline.experiment import Subject
from trainer.recipe.schema import Recipe
from trainer.release.export import audit_files, reload_check, save_checkpoint
from trainer.release.patch import ABOUT, TENSORS, write_patch
from trainer.run.folder import Run, Stage
from trainer.runtime.console import is_main_process, say, table
from trainer.runtime.files import atomic_write


def measure(run: Run, name: str, subject: Subject, after: Sequence[Stage] = ()) -> tuple[dict[str, Any], Stage]:
    """Every figure of the contract for the model as it is now; kept in the run folder, so asked once."""
    stage = run.stage(name, subject.hash("evaluate"), after=after)
    folder = run.dir / "stages" / name
    if not stage.done:
        measurement = subject.suite.measure(subject.model, subject.tokenizer, label=name)
        if is_main_process():
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
        stage.finish_json(path, found)
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
        vocabulary = subject.model.config.get_text_config().vocab_size
        ids = torch.arange(8).unsqueeze(0) % vocabulary
        stock = _stock(subject, trained)
        if stock is not None:
            with torch.no_grad():
                logits = stock(input_ids=ids, use_cache=False).logits
            save_checkpoint(stock, subject.tokenizer, folder, max_shard_size=subject.recipe.export.max_shard_size)
            base = local_folder(subject.recipe.model.name_or_path, subject.recipe.model.revision)
            audit = audit_files(base, folder, expert_set)
            dtype = stock.dtype
            del stock  # of a sharded model the one whole copy: what is read back takes its place
            audit |= reload_check(folder, logits, ids, dtype=dtype, device=torch.device("cpu"))
            atomic_write(audit_path, json.dumps(audit, indent=1))
            if audit["moved_outside"] and expert_set is not None:
                moved = audit["moved_outside"][:5]
                raise RuntimeError(f"{folder}: moved outside the expert set and the routers: {moved}")
            if not audit["reload_ok"]:
                difference = audit["reload_max_logit_difference"]
                raise RuntimeError(f"{folder}: reloaded logits differ by {difference:.3g}")
            if subject.recipe.export.patch and expert_set is not None:
                _write_patch(run, base, folder, expert_set)
            if not subject.recipe.export.model:
                shutil.rmtree(folder)
        written = [run.dir / name for name in ("model", TENSORS, ABOUT) if (run.dir / name).exists()]
        stage.finish([audit_path, *written])
    found: dict[str, Any] = json.loads(audit_path.read_text())
    return found


def _stock(subject: Subject, trained: Trained) -> PreTrainedModel | None:
    """The repaired model without the split, on rank 0; None on the others. Collective.

    On the CPU, where a second copy fits beside it to be compared. The model itself, fused, where it is whole. Else a
    fresh copy that takes over what was trained: all of a sharded model, one tensor after the other, so that rank 0
    holds its shard and one whole copy; of a quantised one the trained parts alone.
    """
    if is_quantised(trained.model):
        assert isinstance(trained, SplitModel), "full fine-tuning of a quantised model is refused by the recipe"
        say("export: from the unquantised base; the figures above are those of the quantised model")
        if not is_main_process():
            return None
        return fuse_into(subject.reloaded().backbone, trained, subject.recipe.repair.lora_alpha)
    if not is_sharded(trained.model):
        trained.fuse()
        trained.model.cpu()
        return trained.model if is_main_process() else None
    stock = load(subject.recipe.model, torch.device("cpu"))[0] if is_main_process() else None
    held = stock.state_dict() if stock is not None else {}
    for name, tensor in trained.stock_state():
        if stock is not None:
            held[name].copy_(tensor)
    return stock


def _write_patch(run: Run, base: Path, folder: Path, expert_set: ExpertSet) -> None:
    model = run.recipe.model
    for name in (TENSORS, ABOUT):
        (run.dir / name).unlink(missing_ok=True)
    try:
        write_patch(
            base,
            folder,
            run.dir,
            base_name=model.name_or_path,
            revision=model.revision,
            expert_set=expert_set,
            recipe_hash=run.recipe.hash(),
            versions=run.manifest.versions,
        )
    except UserError as error:  # a base stored under other names: the checkpoint is whole without a patch
        say(f"no patch: {error}")


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
        control = subject.reloaded()
        repair(control, expert_set.random_like(subject.recipe.run.seed))
        metrics = control.suite.measure_asr(
            control.model, subject.tokenizer, ("seen", "unseen"), label="random control"
        )
        stage.finish_json(path, metrics)
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
    if diagnostics.get("shared_experts_changed"):
        rows.append(["shared_experts_changed", "", str(diagnostics["shared_experts_changed"]), ""])
    rows.append(["untouched_identical", "", str(diagnostics["untouched_identical"]), ""])
    table(f"{recipe.run.name}: {recipe.model.name_or_path}", ["figure", "before", "after", "n"], rows)


def _shown(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]"
