"""Memory of one process under each engine, from what a stage holds and what its steps add.

What each engine keeps was read from DeepSpeed 0.19.8 and torch 2.13 and measured; docs/planning.md has the figures.
All sizes are bytes; `processes` is the number over which an engine splits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from trainer.engines.table import TABLE, names

ENGINES = tuple(TABLE)
"""From the cheapest in time to the dearest."""
SPLIT_WEIGHTS = names(lambda e: e.splits_parameters)
OFFLOADED = names(lambda e: e.offloads)
ONE_PROCESS = names(lambda e: e.one_process)

FP32 = 4
# DeepSpeed's defaults, in elements; ds_configs/*.json leave them alone.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
PREFETCH = 50_000_000


@dataclass(frozen=True)
class StageSizes:
    """Bytes of what a stage holds before any engine splits it. `elements`: the number of trained parameters.

    `twins`: the original routers and shared experts, which no engine splits. `copied`: the original, where that is a
    second model. `unit`: the largest part that is gathered as one. `small`: tensors that ZeRO-3 never splits.
    `kept_views`: fused experts of which autograd keeps a transposed view, so that ZeRO-3 frees a gathered one only
    after the backward pass. `dequantised`: the largest layer unpacked, 0 where nothing is packed. `gradients`: of
    everything that gets them. `states`, `states_fp32`: of the optimiser on the parameters, and on fp32 copies of them.
    """

    weights: int
    weight_elements: int
    twins: int
    copied: int
    unit: int
    small: int
    kept_views: int
    dequantised: int = 0
    elements: int = 0
    gradients: int = 0
    states: int = 0
    states_fp32: int = 0


@dataclass(frozen=True)
class Transient:
    """Bytes of a step that come and go, gradients of parameters left out.

    `peak`: most at any time; `temporary`: most beyond what the forward pass left for the backward pass, which is what
    remains of it when the last gradients arrive.
    """

    peak: int
    temporary: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a stage, by part; the parts add up to `total`.

    `beside`: another model that the run still holds meanwhile. `masters`: ZeRO's fp32 weights. `buffers`: buckets for
    reducing gradients, and layers gathered from the other processes. `activations`: everything a step makes and drops.
    """

    stage: str
    weights: int
    beside: int = 0
    gradients: int = 0
    optimizer: int = 0
    masters: int = 0
    buffers: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stage"}


def processes_of(engine: str, processes: int) -> int:
    """Of so many processes, those that the engine uses."""
    return 1 if engine in ONE_PROCESS else processes


def by_cost(processes: int) -> list[tuple[str, ...]]:
    """The engines for so many processes, from the cheapest to the dearest. Between groups, checkpointing comes first:
    it costs less time than splitting weights, and that less than moving them to the host."""
    if processes == 1:
        return [ONE_PROCESS]
    groups = (
        [e for e in ENGINES if e not in (*ONE_PROCESS, *SPLIT_WEIGHTS)],
        [e for e in SPLIT_WEIGHTS if e not in OFFLOADED],
        OFFLOADED,
    )
    return [tuple(group) for group in groups]


def leanest(processes: int, allowed: Collection[str] = ENGINES) -> str:
    """Of the engines that are allowed the one that leaves least on each GPU, short of moving weights to the host."""
    left = [engine for group in by_cost(processes) for engine in group if engine not in OFFLOADED]
    return [engine for engine in left if engine in allowed][-1]


def memory(
    engine: str,
    stage: str,
    held: StageSizes,
    beside: int,
    step: Transient,
    processes: int,
    *,
    accumulates: bool,
    checkpointing: bool,
) -> Memory:
    """Peak of one process in a stage.

    Args:
        beside: bytes of another model, before splitting.
        accumulates: gradients are kept from one forward pass to the next.
    """
    n, bucket = processes, REDUCE_BUCKET * FP32 if held.elements else 0
    master = FP32 * held.elements
    if engine in ("single", "ddp"):
        gradients, activations = _busiest(step, held.gradients, held.gradients if accumulates else 0)
        buffers = held.gradients if engine == "ddp" else 0
        return Memory(stage, held.weights + held.twins, beside, gradients, held.states, 0, buffers, activations)
    if engine == "zero1":
        at_step = held.gradients + held.gradients // n
        gradients, activations = _busiest(step, at_step, held.gradients if accumulates else 0)
        optimizer = held.states_fp32 // n
        return Memory(stage, held.weights + held.twins, beside, gradients, optimizer, master // n, bucket, activations)
    if engine == "zero2":
        gradients, activations = _busiest(step, 2 * held.gradients // n, held.gradients // n if accumulates else 0)
        optimizer = held.states_fp32 // n
        return Memory(stage, held.weights + held.twins, beside, gradients, optimizer, master // n, bucket, activations)
    weights, beside = held.weights // n + held.twins, beside // n
    if engine == "fsdp2":
        gradients, activations = _busiest(step, held.gradients // n, held.gradients // n if accumulates else 0)
        return Memory(stage, weights, beside, gradients, held.states // n, 0, 2 * held.unit, activations)
    # ZeRO-3. Outside of training one unit is gathered at a time. DeepSpeed's engine frees a layer only when more than
    # MAX_LIVE elements are whole, and gathers ahead.
    live = held.unit
    if held.elements:
        share = held.weights / held.weight_elements
        live = min(held.weights, round(MAX_LIVE * share) + held.unit) + min(held.weights, round(PREFETCH * share))
        if not checkpointing:
            live += held.kept_views
    masters = 0 if held.gradients == master else master // n
    gradients, activations = _busiest(step, 2 * held.gradients // n, held.gradients // n)
    if engine == "zero3-offload":
        return Memory(stage, held.small + held.twins, buffers=bucket + live, activations=step.peak)
    return Memory(stage, weights, beside, gradients, held.states_fp32 // n, masters, bucket + live, activations)


def _busiest(step: Transient, at_end: int, throughout: int) -> tuple[int, int]:
    """Gradients and activations at the fuller of two moments: the loss, or the end of the backward pass."""
    return max((throughout, step.peak), (at_end, step.temporary), key=sum)


def host_memory(engine: str, stock: int, held: StageSizes, gpus: int, processes: int) -> int:
    """Bytes of the memory of the node that holds rank 0, the fullest.

    Every process reads the whole checkpoint there before it goes to its GPU. Where weights are split, the first one
    alone: the others hold a unit at a time, and what a split model has besides the stock one.
    """
    reading = gpus * stock
    if engine in SPLIT_WEIGHTS:
        besides = held.weights - stock + held.twins + held.copied
        reading = stock + gpus * besides + (gpus - 1) * held.unit
    exporting = stock
    if engine == "zero3-offload":
        own = held.weights + held.states_fp32 + held.gradients + FP32 * held.elements
        reading += gpus * own // processes
        exporting += gpus * own // processes
    return max(reading, exporting) + gpus * PROCESS


PROCESS = 1_000_000_000
"""Python with torch, transformers and the GPU's runtime, in each process."""
