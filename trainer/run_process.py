"""What a run asks of its process: to agree with rank 0, and how much memory a stage took."""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_MIB = 1024 * 1024


def from_rank_0(value: T) -> T:
    """The value that rank 0 passes, on every rank; also a barrier. Pickled. Alone, the value itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import PartialState

        # Without this word accelerate takes a launch on CPUs for single processes, and says nothing.
        on_cpu = not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
        PartialState(cpu=on_cpu)
    if not dist.is_initialized():
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but no process group could be made")
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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
