"""Start a run under an engine: check the wish, print the `accelerate launch` line, become that launch.

`launch.sh` is the way in. accelerate and torch's launcher turn every exit code into 1; run in this process they leave
their exception behind, from which the exit code of the worker that failed first is read. Nothing heavy is imported
before the line is printed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError
from trainer.engines import launch_config
from trainer.engines.launch_config import LaunchConfig
from trainer.engines.table import TABLE, default, names

USER_ERROR = 2
DEFAULT_PORT = 29500
GRACE_SECONDS = "300"
"""How long workers may take to save after SIGTERM before torch's launcher kills them; its own default is 30."""
NO_VALUE = re.compile(r"^Option '(\S+)' requires an argument\.$")
"""How typer says it."""


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


@dataclass(frozen=True)
class Asked:
    """What the arguments say; None where they do not."""

    recipe: str | None
    overrides: list[str]
    engine: str | None
    config_file: Path | None
    gpus: int | None
    nodes: int | None
    rank: int | None
    master: str | None
    force: bool
    dry_run: bool


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def read(
    recipe: Annotated[str | None, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, over the recipe.", metavar="[key=value ...]")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=", ".join(TABLE), metavar="NAME")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config_file", help="An accelerate YAML of your own.", metavar="FILE")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Processes on this node; default: every GPU, else 1.", metavar="N")
    ] = None,
    nodes: Annotated[str | None, typer.Option(help="Default: 1.", metavar="N")] = None,
    rank: Annotated[str | None, typer.Option(help="Number of this node, from 0.", metavar="R")] = None,
    master: Annotated[str | None, typer.Option(help="The node of rank 0.", metavar="HOST[:PORT]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew: empties the run folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and stop.")] = False,
) -> Asked:
    """Run a recipe under an engine."""
    if engine is not None and engine not in TABLE:
        raise UserError(f"--engine: found {engine!r}; allowed: {', '.join(TABLE)}")
    return Asked(
        recipe,
        overrides or [],
        engine,
        config_file,
        _whole("--gpus", gpus, 1),
        _whole("--nodes", nodes, 1),
        _whole("--rank", rank, 0),
        master,
        force,
        dry_run,
    )


def _whole(option: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{option}: found {text!r}, expected a whole number of at least {least}")
    return int(text)


def plan(given: Asked, gpus: list[str], cores: int) -> Launch:
    """The launch that the arguments ask for.

    Args:
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
    wanted = given.gpus
    if given.config_file and wanted is None:
        wanted = launch_config.processes_in(given.config_file, nodes)
    processes = _processes(wanted, gpus, cores)
    program = ["-m", "trainer", "run", given.recipe, *given.overrides, *(["--force"] if given.force else [])]
    if given.config_file:
        return _accelerated(given, given.config_file, program, processes, nodes, gpus, cores)
    engine = given.engine or default(processes * nodes, gpus=bool(gpus))
    if TABLE[engine].one_process:
        if nodes > 1 or (given.gpus or 1) > 1:
            several = names(lambda e: not e.one_process)[0]
            raise UserError(
                f"--engine {engine}: it is one process; leave out --gpus and --nodes, or take --engine {several}"
            )
        # Left to see several GPUs, the Trainer would spread one process over them with torch's old DataParallel.
        return Launch(program, {"CUDA_VISIBLE_DEVICES": gpus[0]} if len(gpus) > 1 else {}, alone=True)
    if TABLE[engine].needs_several_processes and processes * nodes == 1:
        alone = names(lambda e: e.one_process)[0]
        raise UserError(f"--engine {engine}: found one process, it needs two or more; --gpus 2, or --engine {alone}")
    return _accelerated(given, launch_config.config_of(engine), program, processes, nodes, gpus, cores)


def _accelerated(
    given: Asked, file: Path, program: list[str], processes: int, nodes: int, gpus: list[str], cores: int
) -> Launch:
    """The launch of `processes` on each of `nodes` under an accelerate YAML."""
    config = launch_config.read(file)
    arguments = ["--config_file", _from_here(file), "--num_processes", str(processes * nodes)]
    arguments += ["--num_machines", str(nodes)]
    if nodes == 1:
        arguments += ["--main_process_port", "0"]  # any free one: two runs may share a node
    else:
        assert given.master is not None, "`_nodes` asks for it"
        host, port = _master(given.master)
        arguments += ["--machine_rank", str(given.rank), "--main_process_ip", host, "--main_process_port", port]
    arguments += config.arguments(nodes)
    return Launch([*arguments, *program], _environment(config, processes, gpus, cores), alone=False)


def _environment(config: LaunchConfig, processes: int, gpus: list[str], cores: int) -> dict[str, str]:
    settings = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)}
    if gpus:
        return settings
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return settings | config.environment_on_cpus() | {"OMP_NUM_THREADS": threads}


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


def _nodes(given: Asked) -> int:
    asked = {"--nodes": given.nodes, "--rank": given.rank, "--master": given.master}
    missing = [name for name, value in asked.items() if value is None]
    if len(missing) == len(asked):
        return 1
    if missing and given.nodes != 1:
        raise UserError(f"{', '.join(missing)}: missing; several nodes need --nodes N --rank R --master HOST on each")
    nodes = given.nodes or 1
    if given.rank is not None and given.rank >= nodes:
        raise UserError(f"--rank: found {given.rank} of {nodes} nodes; allowed: 0 to {nodes - 1}")
    return nodes


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
        launch_config.check_override(key)


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
        given = app(list(arguments), prog_name="launch.sh", standalone_mode=False)
        if not isinstance(given, Asked):  # the help page was asked for
            return 0
        launch = plan(given, gpus_here(), os.cpu_count() or 1)
    except typer.TyperException as error:
        message = NO_VALUE.sub(r"\1: found nothing after it, expected a value", error.format_message())
        print(f"error: {message}", file=sys.stderr)
        return USER_ERROR
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
