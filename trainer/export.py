"""Write the repaired model as a stock checkpoint, and prove from disk that nothing else moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.run_files import tensor_errors_as_oserror


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a fused model and its tokenizer, whole or not at all.

    The folder loads with `AutoModelForCausalLM.from_pretrained` without this project: transformers turns fused experts
    back into the Hub's format, bit for bit.

    Raises:
        OSError: disk full or not writable; a checkpoint written before stays as it was.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tensor_errors_as_oserror(folder):
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


@torch.no_grad()
def audit_checkpoint(
    base: PreTrainedModel, folder: Path, expert_set: ExpertSet | None, logits: Tensor, ids: Tensor
) -> dict[str, Any]:
    """Reload the exported checkpoint and compare it with the base, tensor by tensor and expert by expert.

    Args:
        base: the unrepaired model, stock.
        expert_set: the experts that were allowed to move; None for full fine-tuning.
        logits: the repaired model's logits in memory on `ids`, to compare the reloaded model's with.

    Returns:
        `untouched_identical`: every tensor outside the set and the routers is bit-equal to the base. `moved_outside`
        names the ones that are not. `experts_changed`, `gate_weights_changed` (share), `reload_max_logit_difference`,
        `reload_ok`.
    """
    reloaded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, use_safetensors=True).to(base.device).eval()
    )
    difference = (reloaded(input_ids=ids, use_cache=False).logits.float() - logits.float()).abs().max().item()
    before, after = dict(base.named_parameters()), dict(reloaded.named_parameters())
    before |= dict(base.named_buffers())
    after |= dict(reloaded.named_buffers())
    backbone = Backbone.of(base)
    fused, routers = backbone.expert_parameters(), backbone.router_parameters()
    layer_of = {name: layer.index for layer in backbone for name in fused if name.startswith(layer.experts_name + ".")}
    allowed = expert_set.by_layer() if expert_set is not None else None
    changed_experts: set[tuple[int, int]] = set()
    outside: list[str] = sorted(set(before) ^ set(after))
    gates_total = gates_changed = 0
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if name in routers:
            gates_total += old.numel()
            gates_changed += int((old != new).sum())
        elif name in fused:
            moved = (old != new).flatten(1).any(1).nonzero()[:, 0].tolist()
            changed_experts |= {(layer_of[name], e) for e in moved}
            if allowed is not None and set(moved) - set(allowed.get(layer_of[name], [])):
                outside.append(name)
        elif not torch.equal(old, new) and allowed is not None:
            outside.append(name)
    return {
        "untouched_identical": not outside if allowed is not None else None,
        "moved_outside": sorted(outside),
        "experts_changed": len(changed_experts),
        "experts_total": backbone.total_experts,
        "gate_weights_changed": gates_changed / gates_total,
        "reload_max_logit_difference": difference,
        "reload_ok": difference <= 1e-3,
    }
