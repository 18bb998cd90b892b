"""What each engine can do, asked by name. Only this room and `moe/sharding.py` know engines by their names.

Light: the launcher reads it before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Capabilities:
    """What an engine does with a model, and so what may be asked of it.

    Attributes:
        one_process: never more than one.
        needs_several_processes: refuses to be alone.
        splits_parameters: a model is split over the processes, so that a forward pass needs every one of them.
        splits_optimiser_states: every process keeps a part of the optimiser's states.
        offloads: weights and the optimiser's states lie in the memory of the host.
        holds_packed_weights: weights packed by bitsandbytes may be among the frozen ones.
        steps_with_bitsandbytes: its 8-bit and paged optimisers step what trains (0.50 steps plain tensors alone).
        backward_outside_training: gradients can be had without an optimiser.
        deepspeed_stage: ZeRO's stage; None: without DeepSpeed.
    """

    one_process: bool = False
    needs_several_processes: bool = False
    splits_parameters: bool = False
    splits_optimiser_states: bool = False
    offloads: bool = False
    holds_packed_weights: bool = True
    steps_with_bitsandbytes: bool = True
    backward_outside_training: bool = True
    deepspeed_stage: int | None = None


_ZERO3 = Capabilities(
    splits_parameters=True,
    splits_optimiser_states=True,
    holds_packed_weights=False,
    backward_outside_training=False,
    deepspeed_stage=3,
)

TABLE: dict[str, Capabilities] = {
    "single": Capabilities(one_process=True),
    "ddp": Capabilities(),
    "zero1": Capabilities(splits_optimiser_states=True, deepspeed_stage=1),
    "zero2": Capabilities(splits_optimiser_states=True, deepspeed_stage=2),
    "fsdp2": Capabilities(
        needs_several_processes=True,
        splits_parameters=True,
        splits_optimiser_states=True,
        holds_packed_weights=False,
        steps_with_bitsandbytes=False,
    ),
    "zero3": _ZERO3,
    "zero3-offload": replace(_ZERO3, offloads=True),
}
"""From the cheapest in time to the dearest."""


def names(where: Callable[[Capabilities], bool]) -> tuple[str, ...]:
    """The engines that can do this, from the cheapest to the dearest: `names(lambda e: e.splits_parameters)`."""
    return tuple(name for name, can in TABLE.items() if where(can))


def default(processes: int, *, gpus: bool) -> str:
    """The engine of a launch that names none."""
    if processes == 1:
        return "single"
    return "zero2" if gpus else "ddp"
