"""Where each engine keeps the optimiser's states: whole, or a part in every process; read and put back.

Under DeepSpeed the real optimiser lies inside ZeRO's and steps flat fp32 partitions; under FSDP2 it steps DTensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from data_prep.errors import UserError
from trainer.engines.table import names

WHOLE = " or ".join(names(lambda e: not e.splits_optimiser_states))
"""These keep the same, whole states, and go on from each other's."""
NUMBER = "number:"
"""Marks a state that the optimiser keeps as a Python number (bitsandbytes: its steps)."""


def kept_by(trainer: Trainer) -> str:
    """The engine whose parts the optimiser's states lie in, or `WHOLE`. Offloading cuts them no differently."""
    if trainer.is_deepspeed_enabled:
        stage = trainer.model_wrapped.zero_optimization_stage()
        return names(lambda e: e.deepspeed_stage == stage)[0]
    return "fsdp2" if any(isinstance(p, DTensor) for p in _held(trainer)) else WHOLE


def are_split(trainer: Trainer) -> bool:
    """Whether every process keeps a part of its own."""
    return kept_by(trainer) != WHOLE


def read(trainer: Trainer) -> dict[str, Tensor]:
    """`<index>/<key>` -> this rank's part of a state, on the CPU; under ZeRO the fp32 weights too, as `master`."""
    state = _real(trainer).state
    found: dict[str, Tensor] = {}
    for i, held in enumerate(_held(trainer)):
        parts = {
            key if isinstance(value, Tensor) else NUMBER + key: torch.as_tensor(value)
            for key, value in state.get(held, {}).items()
            if isinstance(value, (Tensor, int, float))
        }
        if _zero(trainer) is not None:
            parts["master"] = held
        for key, value in parts.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            found[f"{i}/{key}"] = local.detach().cpu().clone()
    return found


@torch.no_grad()
def load(trainer: Trainer, found: dict[str, Tensor], path: Path) -> None:
    """Put back what `read` gave this rank; `path` names its checkpoint.

    Raises:
        UserError: the states of other parameters.
    """
    state, held = _real(trainer).state, _held(trainer)
    for name, value in found.items():
        index, _, key = name.partition("/")
        if int(index) >= len(held):
            raise UserError(f"{path}: its optimiser steps other parameters; remove it to train this stage anew")
        target = held[int(index)]
        local = target.to_local() if isinstance(target, DTensor) else target
        if key == "master":
            target.copy_(value)
        elif key.startswith(NUMBER):
            state[target][key.removeprefix(NUMBER)] = value.item()
        elif value.shape != local.shape:
            state[target][key] = value if value.ndim == 0 else value.to(local.device)
        elif isinstance(target, DTensor):
            state[target][key] = DTensor.from_local(
                value.to(local.device),
                target.device_mesh,
                target.placements,
                shape=target.shape,
                stride=target.stride(),
            )
        else:
            state[target][key] = value.to(local.device)


def _zero(trainer: Trainer) -> Any | None:
    """DeepSpeed's ZeRO optimiser around the real one."""
    if not trainer.is_deepspeed_enabled:
        return None
    return trainer.model_wrapped.optimizer


def _held(trainer: Trainer) -> list[Tensor]:
    """What the real optimiser steps: flat fp32 partitions under ZeRO, else the parameters themselves."""
    zero = _zero(trainer)
    if zero is None:
        return [p for group in trainer.optimizer.param_groups for p in group["params"]]
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return list(zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups)


def _real(trainer: Trainer) -> torch.optim.Optimizer:
    zero = _zero(trainer)
    optimiser: Any = zero if zero is not None else trainer.optimizer
    while hasattr(optimiser, "optimizer"):
        optimiser = optimiser.optimizer
    return optimiser
