"""Time and peak memory of a call, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """`seconds`: of the clock on a GPU, of the processor on a CPU, where other processes may run. `grown`: bytes that
    the call added to the memory in use at its peak: allocated (GPU) or resident (CPU, Linux; elsewhere None)."""

    seconds: float
    grown: int | None


def now(device: torch.device) -> float:
    """Seconds, to be subtracted: of the clock once a GPU has done its work, else of this process on its processors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def cost_of(call: Callable[[], object], device: torch.device) -> Cost:
    """Call once, and say what it cost."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, start = torch.cuda.memory_allocated(device), now(device)
        call()
        return Cost(now(device) - start, torch.cuda.max_memory_allocated(device) - before)
    if is_readable := _CLEAR.exists():
        # Freed memory that the allocator keeps would be used again, and not seen to grow.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak of resident memory starts anew
    before, start = _resident("VmRSS") if is_readable else 0, now(device)
    call()
    seconds = now(device) - start
    return Cost(seconds, max(0, _resident("VmHWM") - before) if is_readable else None)


def _resident(key: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
