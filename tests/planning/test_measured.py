"""Planned memory against the measured peak of real stages, in processes of their own (docs/planning.md)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# glibc would keep freed blocks for itself: it gives these back to the system.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DEEPSPEED = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}
FSDP2 = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WITHIN = 0.15

FP32 = ("lora", "full+ckpt", "full+kl", "whole", "full+accumulate", "lora+gates")
BF16 = ("lora+bf16", "full+ckpt+bf16", "full+kl+bf16", "whole+bf16", "full+accumulate+bf16", "lora+gates+bf16")

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")


def measured(launcher: list[str], cases: list[str], **environment: str) -> list[dict[str, Any]]:
    set_here = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **MALLOC, **environment}
    done = subprocess.run(
        [*launcher, "-m", "tests.planning.measure", *cases],
        cwd=ROOT,
        env={**os.environ, **set_here},
        capture_output=True,
        text=True,
        timeout=900,
    )
    # Two processes write to one pipe: their lines can run together.
    starts = [found.start() for found in re.finditer(r'\{"case"', done.stdout)]
    found = [json.JSONDecoder().raw_decode(done.stdout, start)[0] for start in starts]
    assert done.returncode == 0 and found, done.stderr[-2000:]
    return found


def near(found: dict[str, Any]) -> None:
    assert abs(found["planned_mib"] / found["measured_mib"] - 1) <= WITHIN, found


@pytest.mark.parametrize("case", ["full", pytest.param("full+bf16", marks=pytest.mark.slow)])
def test_one_process_holds_what_was_planned(case: str) -> None:
    (found,) = measured([sys.executable], [case])
    assert found["engine"] == "single"
    near(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FP32, *BF16])
def test_one_process_holds_what_was_planned_in_other_settings(case: str) -> None:
    (found,) = measured([sys.executable], [case])
    near(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "full+bf16"])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_each_of_two_processes_holds_what_was_planned(engine: str, case: str) -> None:
    config = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": f"ds_configs/{engine}.json"}
    environment = {"ddp": {"ACCELERATE_USE_CPU": "true"}, "fsdp2": FSDP2}.get(engine, DEEPSPEED | config)
    found = measured(LAUNCHER, [case], **environment)
    assert [one["engine"] for one in found] == [engine] * 2
    for one in found:
        near(one)
