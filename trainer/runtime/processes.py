"""What a run asks of its processes: to share work, to agree, and how much memory a stage took."""

import atexit
import contextlib
import os
import resource
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from data_prep.errors import UserError

T = TypeVar("T")

NUMBERS = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "HF_HUB_DOWNLOAD_TIMEOUT": 1,
    "HF_HUB_ETAG_TIMEOUT": 1,
}
"""Variable -> its smallest value. huggingface_hub's own error does not say which variable it is about."""

_MIB = 1024 * 1024

PATIENCE = timedelta(hours=2)
"""How long processes wait for one: rank 0 alone reads, exports and audits a checkpoint. NCCL's default is 10 min."""


def check_environment() -> None:
    """`UserError` where a number in the environment, a launcher's or the Hub's, cannot be: names the variable."""
    numbers = {}
    for name, least in NUMBERS.items():
        text = os.environ.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
            raise UserError(f"{name}: found {text!r} in the environment, expected a whole number of at least {least}")
        numbers[name] = int(text)
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in numbers and of in numbers and numbers[name] >= numbers[of]:
            raise UserError(f"{name}: found {numbers[name]} in the environment, expected less than {of}={numbers[of]}")
    if numbers.get("WORLD_SIZE", 1) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"{name}: not in the environment, though WORLD_SIZE={numbers['WORLD_SIZE']}; start with launch.sh"
                )


def rank() -> int:
    """Number of this process among all, 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave(code: int = 0) -> NoReturn:
    """End this process with `code`, once every process has come here; alone, or before they met, as `sys.exit`.

    Of several processes each ends without the interpreter's teardown. A thread of gloo's may hold the last reference
    to a tensor and want the interpreter while that goes down: "terminate called without an active exception", SIGABRT
    after all work was done (pytorch/pytorch#190489; goes when torch asks `Py_IsFinalizing` there). To destroy the
    process group before does not help: under ZeRO-3 that aborts too (DeepSpeed 0.19.8).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        # gloo aborts a process that still talks to one that has ended.
        any_rank(False)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def from_rank_0(value: T) -> T:
    """The value that rank 0 passes, on every rank; also a barrier. Pickled. Alone, the value itself."""
    if world_size() == 1:
        return value
    box = [value]
    _group().broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(found: dict[int, T]) -> list[T]:
    """What the ranks found for the items dealt to them, in the items' order, on every rank. Pickled."""
    if world_size() > 1:
        parts: list[dict[int, T]] = [{}] * world_size()
        _group().all_gather_object(parts, found)
        found = {index: value for part in parts for index, value in part.items()}
    assert sorted(found) == list(range(len(found))), "an item was dealt to no rank"
    return [found[index] for index in range(len(found))]


def dealt(items: Sequence[T], *, together: bool) -> list[tuple[int, T]]:
    """The share of this rank: every `world_size`-th item with its index.

    Args:
        together: every rank gets equally many, as a sharded model's collective forward needs; a rank that would have
            one fewer computes the first item again, which changes nothing.
    """
    mine = list(enumerate(items))[rank() :: world_size()]
    if together and items and len(mine) < -(-len(items) // world_size()):
        mine.append((0, items[0]))
    return mine


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; every rank asks."""
    if world_size() == 1:
        return flag
    import torch
    from accelerate import PartialState

    group = _group()
    box = torch.tensor(int(flag), device=PartialState().device)
    group.all_reduce(box)
    return bool(box.item())


def _group() -> ModuleType:
    """`torch.distributed`, with its process group made."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import PartialState

        # Without this word accelerate takes a launch on CPUs for single processes, and says nothing.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if not dist.is_initialized():
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but no process group could be made")
    return dist


class PeakMemory:
    """The most memory this process held since the object was made: resident, and on the GPU where there is one."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            # Linux: forget the peak so far. Elsewhere the peak is that of the whole process.
            Path("/proc/self/clear_refs").write_text("5")
        if _cuda():
            sys.modules["torch"].cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float]:
        """`peak_memory_mb` and, with a GPU, `peak_gpu_memory_mb`, both in MiB."""
        peaks = {"peak_memory_mb": round(_resident_peak() / _MIB, 1)}
        if _cuda():
            peaks["peak_gpu_memory_mb"] = round(sys.modules["torch"].cuda.max_memory_allocated() / _MIB, 1)
        return peaks


def _resident_peak() -> int:
    """Bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cuda() -> bool:
    # A stage that never loaded torch has no GPU memory, and loading it takes seconds.
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_initialized())
