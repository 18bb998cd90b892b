"""Start a run under an engine: check the wish, print the `accelerate launch` line, become that launch.

`launch.sh` is the way in. accelerate and torch's launcher turn every exit code into 1; run in this process they leave
their exception behind, from which the exit code of the worker that failed first is read. Nothing heavy is imported
before the line is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "ds_configs"
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")

USER_ERROR = 2
DEFAULT_PORT = 29500
GRACE_SECONDS = "300"
"""How long workers may take to save after SIGTERM before torch's launcher kills them; its own default is 30."""

# What accelerate (1.15, `_deepspeed_config_checks`) refuses beside a deepspeed_config_file, with twenty lines of text.
INLINE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
AUTO_EP = "expert_parallel"
"""The section of a DeepSpeed configuration that turns on AutoEP (DeepSpeed >= 0.19)."""


@dataclass(frozen=True)
class Launch:
    """`arguments` of `accelerate launch`, or of this interpreter where there is one process; what is set for it."""

    arguments: list[str]
    environment: dict[str, str]
    alone: bool

    def line(self) -> str:
        """The command as a person would type it."""
        start = [sys.executable] if self.alone else ["accelerate", "launch"]
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*settings, shlex.join([*start, *self.arguments])])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.replace("expected one argument", "found nothing after it, expected a value")
        raise UserError(message.removeprefix("argument "))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def _engine(text: str) -> str:
    if text not in ENGINES:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: {', '.join(ENGINES)}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="launch.sh", description="Run a recipe under an engine.", allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe")
    parser.add_argument("--engine", type=_engine, metavar="NAME", help=", ".join(ENGINES))
    parser.add_argument("--config_file", type=Path, metavar="FILE", help="an accelerate YAML of your own")
    parser.add_argument("--gpus", type=_count, metavar="N", help="processes on this node; default: every GPU, else 1")
    parser.add_argument("--nodes", type=_count, metavar="N", help="default: 1")
    parser.add_argument("--rank", type=int, metavar="R", help="number of this node, from 0")
    parser.add_argument("--master", metavar="HOST[:PORT]", help="the node of rank 0")
    parser.add_argument("--force", action="store_true", help="start anew: empties the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print the line and stop")
    return parser


def plan(given: argparse.Namespace, gpus: list[str], cores: int) -> Launch:
    """The launch that the arguments ask for.

    Args:
        given: what `_parser` read.
        gpus: the GPUs of this node, as `CUDA_VISIBLE_DEVICES` would name them.
        cores: CPU cores of this node; without GPUs there are at most as many processes, though always two.

    Raises:
        UserError: one line that says what to do instead.
    """
    if given.recipe is None:
        raise UserError("no recipe given; usage: launch.sh RECIPE [--engine NAME] [--gpus N] [key=value ...]")
    if not Path(given.recipe).is_file():
        raise UserError(f"{given.recipe}: no such file; the first argument is a recipe")
    _check_overrides(given.overrides)
    if given.engine and given.config_file:
        raise UserError("--engine and --config_file: found both; the file names the engine itself, so give one")
    nodes = _nodes(given)
    wanted = _processes_in(given.config_file, nodes) if given.config_file and not given.gpus else given.gpus
    processes = _processes(wanted, gpus, cores)
    program = ["-m", "trainer", "run", given.recipe, *given.overrides, *(["--force"] if given.force else [])]
    if given.config_file:
        return _accelerated(given, given.config_file, program, processes, nodes, gpus, cores)
    engine = given.engine or _default_engine(processes * nodes, gpus)
    if engine == "single":
        if nodes > 1 or (given.gpus or 1) > 1:
            raise UserError("--engine single: it is one process; leave out --gpus and --nodes, or take --engine ddp")
        # Left to see several GPUs, the Trainer would spread one process over them with torch's old DataParallel.
        return Launch(program, {"CUDA_VISIBLE_DEVICES": gpus[0]} if len(gpus) > 1 else {}, alone=True)
    if engine == "fsdp2" and processes * nodes == 1:
        raise UserError("--engine fsdp2: found one process, it needs two or more; --gpus 2, or --engine single")
    return _accelerated(given, CONFIGS / f"{engine}.yaml", program, processes, nodes, gpus, cores)


def _accelerated(
    given: argparse.Namespace,
    config: Path,
    program: list[str],
    processes: int,
    nodes: int,
    gpus: list[str],
    cores: int,
) -> Launch:
    """The launch of `processes` on each of `nodes` under an accelerate YAML."""
    deepspeed, found_at = _check_config(config)
    arguments = ["--config_file", _from_here(config), "--num_processes", str(processes * nodes)]
    arguments += ["--num_machines", str(nodes)]
    if found_at is not None:
        arguments += ["--deepspeed_config_file", str(found_at)]
    if nodes == 1:
        arguments += ["--main_process_port", "0"]  # any free one: two runs may share a node
    else:
        host, port = _master(given.master)
        arguments += ["--machine_rank", str(given.rank), "--main_process_ip", host, "--main_process_port", port]
        if deepspeed:
            arguments += ["--deepspeed_multinode_launcher", "standard"]
    return Launch([*arguments, *program], _environment(processes, gpus, cores, deepspeed), alone=False)


def _default_engine(processes: int, gpus: list[str]) -> str:
    if processes == 1:
        return "single"
    return "zero2" if gpus else "ddp"


def _environment(processes: int, gpus: list[str], cores: int, deepspeed: bool) -> dict[str, str]:
    settings = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)}
    if gpus:
        return settings
    # accelerate 1.15 runs plain DDP, and says nothing, where its own CPU switch and DeepSpeed meet.
    settings |= (
        {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"} if deepspeed else {"ACCELERATE_USE_CPU": "true"}
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return settings | {"OMP_NUM_THREADS": threads}


def _processes(wanted: int | None, gpus: list[str], cores: int) -> int:
    if wanted is None:
        return len(gpus) or 1
    if gpus and wanted > len(gpus):
        raise UserError(f"--gpus: found {wanted}, this machine has {len(gpus)}; ask for at most {len(gpus)}")
    if not gpus and wanted > max(2, cores):
        raise UserError(
            f"--gpus: found {wanted}, this machine has no GPU and {cores} cores; ask for at most {max(2, cores)}"
        )
    return wanted


def _processes_in(path: Path, nodes: int) -> int | None:
    """The processes of each node in an accelerate YAML."""
    config = _mapping(path)
    named, total = config.get("num_machines", 1), config.get("num_processes")
    if named != nodes:
        raise UserError(f"{path}: num_machines: found {named}, --nodes says {nodes}; let them agree")
    if total is not None and (not isinstance(total, int) or total < nodes or total % nodes):
        raise UserError(f"{path}: num_processes: found {total!r}, expected a multiple of num_machines ({nodes})")
    return total // nodes if total else None


def _nodes(given: argparse.Namespace) -> int:
    asked = {"--nodes": given.nodes, "--rank": given.rank, "--master": given.master}
    missing = [name for name, value in asked.items() if value is None]
    if len(missing) == len(asked):
        return 1
    if missing and given.nodes != 1:
        raise UserError(f"{', '.join(missing)}: missing; several nodes need --nodes N --rank R --master HOST on each")
    if given.rank is not None and not 0 <= given.rank < given.nodes:
        raise UserError(f"--rank: found {given.rank} of {given.nodes} nodes; allowed: 0 to {given.nodes - 1}")
    return int(given.nodes)


def _master(text: str) -> tuple[str, str]:
    host, colon, port = text.partition(":")
    if not host or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise UserError(f"--master: found {text!r}, expected HOST or HOST:PORT, such as node-0:{DEFAULT_PORT}")
    return host, port or str(DEFAULT_PORT)


def _check_overrides(overrides: Sequence[str]) -> None:
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals:
            raise UserError(f"{item}: found after the recipe, expected section.key=value")
        if AUTO_EP in key or "autoep" in key.replace("_", ""):
            raise _auto_ep(key)


def _auto_ep(where: str) -> UserError:
    return UserError(
        f"{where}: DeepSpeed's AutoEP replaces whole MoE blocks, routers and critical experts with them; take it out"
        " and use --engine zero3"
    )


def _check_config(path: Path) -> tuple[bool, Path | None]:
    """Whether an accelerate YAML asks for DeepSpeed, and where its JSON is if not where it says."""
    config = _mapping(path)
    kind = config.get("distributed_type")
    if kind in ("MULTI_GPU", "FSDP"):
        return False, None
    if kind != "DEEPSPEED":
        raise UserError(
            f"{path}: distributed_type: found {kind!r}; allowed: MULTI_GPU, DEEPSPEED, FSDP; for one process take"
            " --engine single"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed: not installed; pip install 'routealign[gpu]', or --engine fsdp2")
    section = config.get("deepspeed_config") or {}
    named = section.get("deepspeed_config_file")
    if named is None:
        raise UserError(
            f"{path}: deepspeed_config has no deepspeed_config_file; settings given inline cannot say all that is"
            " needed, so name a JSON file such as ds_configs/zero3.json"
        )
    inline = [key for key in INLINE if key in section] + [key for key in ("mixed_precision",) if key in config]
    if inline:
        raise UserError(f"{path}: {', '.join(inline)} beside deepspeed_config_file; set it in {named} and not here")
    file = next((at for at in (Path(named), ROOT / named) if at.is_file()), None)
    if file is None:
        raise UserError(f"{path}: deepspeed_config_file: {named}: no such file")
    if (_mapping(file).get(AUTO_EP) or {}).get("enabled"):
        raise _auto_ep(f"{file}: {AUTO_EP}")
    return True, None if file == Path(named) else file


def _mapping(path: Path) -> dict[str, Any]:
    """The contents of a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not readable: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected keys with values")
    return found


def _from_here(path: Path) -> str:
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def gpus_here() -> list[str]:
    """The NVIDIA GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; empty without a driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []
    present = [line.split(":")[0].removeprefix("GPU ") for line in listed if line.startswith("GPU ")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]


def main(arguments: Sequence[str]) -> int:
    """Launch; returns the exit code: 2 for a user's error, 128 + signal, or that of the worker that failed first."""
    try:
        given = _parser().parse_intermixed_args(arguments)
        launch = plan(given, gpus_here(), os.cpu_count() or 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if not given.dry_run and importlib.util.find_spec("accelerate") is None:
        print(f"error: {sys.executable} has no accelerate; run make install, or set PYTHON", file=sys.stderr)
        return USER_ERROR
    print(f"+ {launch.line()}", flush=True)
    if given.dry_run:
        return 0
    os.environ.update(launch.environment)
    if launch.alone:
        os.execv(sys.executable, [sys.executable, *launch.arguments])
    return _accelerate(launch.arguments)


def _accelerate(arguments: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ConnectionError:  # only where the port was asked for
        print("error: --master: its port is taken on this node; give another with --master HOST:PORT", file=sys.stderr)
        return USER_ERROR
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code != USER_ERROR:  # that worker wrote its one line
            print(f"error: rank {rank} was the first to fail, exit code {code}; it wrote why above", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
