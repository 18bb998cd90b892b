"""What leaves a run: the stock checkpoint, its audit, the patch, `evaluation.json` and the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.model.load import load
from trainer.model.weight_files import local_folder
from trainer.moe.expert_set import ExpertSet
from trainer.moe.experts import SplitModel
from trainer.moe.footprint import Footprint
from trainer.moe.quantised import fuse_into, is_quantised
from trainer.moe.sharding import is_sharded
from trainer.moe.trainable import TrainableModel
from trainer.pipeline.experiment import Experiment
from trainer.pipeline.measure import changes
from trainer.recipe.sections import ExportSection
from trainer.release.audit import audit_files, logits_of, refuse_failed, reload_check
from trainer.release.export import export_checkpoint
from trainer.release.patch import ABOUT, TENSORS, write_patch
from trainer.release.trained import Trained
from trainer.reporting import html
from trainer.reporting.method_report import Report
from trainer.run.step import Kept, Step
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import atomic_write

EVALUATION_VERSION = 1
"""Of `evaluation.json`; docs/evaluation-json.md."""

PROBED = 128
"""Tokens of prompts, and as many drawn ones, on which the trained and the exported model are compared."""

MOVED = (
    "experts_changed",
    "experts_total",
    "shared_experts_changed",
    "gate_weights_changed",
    "untouched_identical",
)
"""Figures of the audit that stand in `evaluation.json`, too."""


def export_and_audit(
    experiment: Experiment[Any],
    section: ExportSection,
    stock: Callable[[], PreTrainedModel | None],
    footprint: Footprint,
    after: Sequence[Step[Any]],
    experts: ExpertSet | None = None,
    reads: Sequence[str] = (),
    trained: TrainableModel | None = None,
) -> dict[str, Any]:
    """Write the checkpoint, reload it from disk and prove what moved; `audit.json`.

    Args:
        stock: the edited model as transformers knows it, on the CPU of rank 0; None on the others. Collective.
        footprint: what the stages may have changed.
        experts: the critical experts, to be named in the patch.
        reads: the recipe's sections that the edit depends on, where no step before it does.
        trained: the model as it was trained, which `stock` makes the stock model of: the export is held against it.

    Raises:
        AuditFailed: something outside the footprint moved, the export is not what was trained or not the base's
            folder, nothing was trained, or the reloaded checkpoint answers differently. The checkpoint is kept for
            inspection, the step does not count as done.
    """
    audit_path, folder = experiment.folder / "audit.json", experiment.folder / "model"
    patch = [experiment.folder / name for name in (TENSORS, ABOUT)]

    def make() -> dict[str, Any]:
        if is_quantised(experiment.model):
            say("export: from the unquantised base; the figures above are those of the quantised model")
        ids = probe(experiment)
        base = local_folder(experiment.recipe.model.name_or_path, experiment.recipe.model.revision, others=True)
        before = None if trained is None else Trained.of(trained, base, keep=is_main_process())
        logits = None if trained is None else _logits_of_trained(trained, ids)
        model = stock()
        if model is None:
            return {}
        logits = logits_of(model, ids) if logits is None else logits
        export_checkpoint(model, base, folder, section)
        dtype = model.dtype
        del model  # of a sharded model the one whole copy: what is read back takes its place
        audit = audit_files(base, folder, footprint)
        audit |= reload_check(folder, logits, ids, dtype=dtype, device=torch.device("cpu"), trained=before)
        atomic_write(audit_path, json.dumps(audit, indent=1))
        refuse_failed(audit, folder)
        if audit["not_exported"]:
            say(f"audit: in the base and not in the export: {', '.join(audit['not_exported'][:8])}")
        if audit["not_moved"]:
            say(f"audit: did not change, though it was to be trained: {', '.join(audit['not_moved'][:8])}")
        if section.patch and audit["untouched_identical"] is not None:
            _write_patch(experiment, base, folder, footprint, experts)
        if not section.model:
            shutil.rmtree(folder)
        return audit

    def written(_: dict[str, Any]) -> None:
        """By `make`, before it refuses: a failed audit is there to be read."""

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(audit_path.read_text())
        return found

    def files() -> list[Path]:
        return [audit_path, *(path for path in (folder, *patch) if path.exists())]

    return experiment.step("export", make, Kept(written, files, read), reads=["export", *reads], after=after).value


def probe(experiment: Experiment[Any]) -> Tensor:
    """Token ids [8, 32] to ask the trained and the exported model: half of them chat prompts of the corpus, half drawn
    from the whole vocabulary, so that more experts are reached than the prompts use.
    """
    draw = torch.Generator().manual_seed(experiment.recipe.run.seed)
    tokenizer = experiment.chat.tokenizer
    vocabulary = experiment.model.config.get_text_config().vocab_size
    added = set(tokenizer.get_added_vocab().values())
    words = torch.tensor([token for token in range(min(vocabulary, len(tokenizer))) if token not in added])
    openings = (experiment.chat.opening(goal.conversation) for goal in experiment.corpus.harmful.train[:PROBED])
    asked = [token for opening in openings for token in opening][:PROBED]
    drawn = words[torch.randint(len(words), (2 * PROBED - len(asked),), generator=draw)]
    return torch.cat([torch.tensor(asked, dtype=torch.long), drawn]).view(8, -1)


def _logits_of_trained(trained: TrainableModel, ids: Tensor) -> Tensor | None:
    """Logits before anything is fused; None of a quantised model, which answers otherwise than its export must."""
    if is_quantised(trained.model):
        return None
    if not is_sharded(trained.model):
        if not is_main_process():
            return None
        trained.model.cpu()  # where the checkpoint is read back: another device adds up in another order
    return logits_of(trained.model, ids)


def _write_patch(
    experiment: Experiment[Any], base: Path, folder: Path, footprint: Footprint, experts: ExpertSet | None
) -> None:
    model = experiment.recipe.model
    for name in (TENSORS, ABOUT):
        (experiment.folder / name).unlink(missing_ok=True)
    try:
        write_patch(
            base,
            folder,
            experiment.folder,
            base_name=model.name_or_path,
            revision=model.revision,
            footprint=footprint,
            expert_set=experts,
            recipe_hash=experiment.recipe.hash(),
            versions=experiment.versions,
        )
    except UserError as error:  # a base stored under other names: the checkpoint is whole without a patch
        say(f"no patch: {error}")


def stock_of(experiment: Experiment[Any], trained: TrainableModel, lora_alpha: float | None) -> PreTrainedModel | None:
    """The repaired model without the split, on rank 0; None on the others. Collective.

    On the CPU, where a second copy fits beside it to be compared. The model itself, fused, where it is whole. Else a
    fresh copy that takes over what was trained: all of a sharded model, one tensor after the other, so that rank 0
    holds its shard and one whole copy; of a quantised one the trained parts alone.
    """
    if is_quantised(trained.model):
        assert isinstance(trained, SplitModel), "full fine-tuning of a quantised model is refused by the recipe"
        if not is_main_process():
            return None
        return fuse_into(experiment.reloaded().backbone, trained, lora_alpha)
    if not is_sharded(trained.model):
        if not is_main_process():
            return None
        trained.fuse()
        trained.model.cpu()
        return trained.model
    stock = load(experiment.recipe.model, torch.device("cpu"))[0] if is_main_process() else None
    held = stock.state_dict() if stock is not None else {}
    for name, tensor in trained.stock_state():
        if stock is not None:
            held[name].copy_(tensor)
    return stock


def publish(
    experiment: Experiment[Any],
    evaluation: dict[str, Any],
    report: Report,
    summary: Callable[[dict[str, Any]], None],
) -> None:
    """Write `evaluation.json` and the report, and print the summary; rank 0."""
    if not is_main_process():
        return
    versioned = {"version": EVALUATION_VERSION, **evaluation, "changes": changes(experiment)}
    atomic_write(experiment.folder / "evaluation.json", json.dumps(versioned, indent=1))
    experiment.settle()
    summary(versioned)
    say(f"report: {html.write(experiment.folder, report)}")
