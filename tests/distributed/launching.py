"""Start the processes of a test under an engine, as launch.sh does on CPUs but with any Python module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def start(
    engine: str, folder: Path, module: str, *arguments: str | Path, processes: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in `processes` processes (one for "single"); output is captured.

    Several processes have the machine's other tests beside them, but never several processes of another test: ranks
    that wait for each other on fewer cores than there are ranks take many times as long.
    """
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
    with ExitStack() as stack:
        if engine != "single":
            stack.enter_context(FileLock(Path(tempfile.gettempdir()) / "routealign-tests-of-several-processes.lock"))
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as started:
            try:
                out, err = started.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                # The launcher ends its ranks at SIGTERM; killed, it would leave them running beside every later test.
                started.terminate()
                raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


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
