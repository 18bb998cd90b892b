"""Start the processes of a test under an engine, as launch.sh does on CPUs but with any Python module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def start(
    engine: str, folder: Path, module: str, *arguments: str | Path, processes: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in `processes` processes (one for "single"); output is captured."""
    command = [sys.executable]
    if engine != "single":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", module, *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **words_of_the_launcher(engine, folder),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def words_of_the_launcher(engine: str, folder: Path) -> dict[str, str]:
    """What the launcher says in the environment."""
    if engine == "single":
        return {}
    if not engine.startswith("zero"):
        sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if engine == "fsdp2" else {}
        return {"ACCELERATE_USE_CPU": "true", **sharded}
    config = json.loads((ROOT / "ds_configs" / f"{engine}.json").read_text())
    if engine.startswith("zero3"):
        # Small parameters stay whole by default, and a tiny model has no others.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{engine}.json"
    path.write_text(json.dumps(config))
    return {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }
