"""launch.sh: what it picks, prints and refuses; signals and exit codes; the files of ds_configs/ and their page."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.cli import launch as launching
from trainer.engines.table import TABLE

STUB = """
import os, signal, sys, time
if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker, not the launcher
    rank, mode = os.environ["RANK"], os.environ["STUB"]
    def say(*words):
        os.write(1, (" ".join(words) + "\\n").encode())  # in one piece: the workers share a pipe
    def leave(code, *words):
        say(*words)
        os._exit(code)
    if mode == "environment":
        names = ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP",
                 "FSDP_VERSION", "ACCELERATE_USE_CPU", "DS_ACCELERATOR", "ACCELERATE_MIXED_PRECISION")
        leave(0, "worker", rank, *(f"{name}={os.environ.get(name)}" for name in names))
    if mode == "save":
        signal.signal(signal.SIGTERM, lambda *_: leave(143, "saved", rank))
        say("ready", rank)
    if mode == "user" and rank == "0":
        sys.stderr.write("error: recipe.yaml: no such file\\n")
        leave(2)
    if mode == "fail" and rank == "1":
        leave(7)
    if mode == "kill" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


class Machine:
    """`main` in this process, with the GPUs that a test wants, and launch.sh in one of its own."""

    def __init__(self, root: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.root, self.tmp, self.monkeypatch, self.capsys = root, tmp, monkeypatch, capsys
        (tmp / "sitecustomize.py").write_text(STUB)
        (tmp / "recipe.yaml").write_text("{}\n")
        self.has(0)

    def has(self, gpus: int, cores: int = 4) -> None:
        self.monkeypatch.setattr(launching, "gpus_here", lambda: [str(i) for i in range(gpus)])
        self.monkeypatch.setattr(os, "cpu_count", lambda: cores)

    def line(self, *arguments: str) -> str:
        assert launching.main(["recipes/organism/rasa.yaml", *arguments, "--dry-run"]) == 0
        line = self.capsys.readouterr().out
        assert line.startswith("+ ") and line.count("\n") == 1
        return line.removeprefix("+ ").rstrip()

    def refusal(self, *arguments: str) -> str:
        assert launching.main(arguments) == 2
        out, error = self.capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
        return error

    def start(self, mode: str, *arguments: str) -> "subprocess.Popen[str]":
        given = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        given |= {"PYTHON": sys.executable, "PYTHONPATH": str(self.tmp), "STUB": mode, "OMP_NUM_THREADS": "1"}
        given |= {"CUDA_VISIBLE_DEVICES": ""}
        command = [str(self.root / "launch.sh"), str(self.tmp / "recipe.yaml"), *arguments]
        return subprocess.Popen(
            command, cwd=self.tmp, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


@pytest.fixture
def machine(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Machine]:
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    yield Machine(root, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("gpus", "arguments", "engine", "processes"),
    [
        (0, [], None, 1),
        (1, [], None, 1),
        (8, [], "zero2", 8),
        (8, ["--gpus", "4"], "zero2", 4),
        (8, ["--gpus", "1"], None, 1),
        (8, ["--engine", "zero3"], "zero3", 8),
        (0, ["--gpus", "2"], "ddp", 2),
        (0, ["--engine", "zero3-offload"], "zero3-offload", 1),
        (1, ["--nodes", "2", "--rank", "0", "--master", "a"], "zero2", 2),
    ],
)
def test_the_engine_and_the_processes_come_from_the_machine(
    machine: Machine, gpus: int, arguments: list[str], engine: str | None, processes: int
) -> None:
    machine.has(gpus)
    line = machine.line(*arguments)
    if engine is None:
        assert line.endswith(f"{sys.executable} -m trainer run recipes/organism/rasa.yaml")
        assert line.startswith("CUDA_VISIBLE_DEVICES=0 ") == (gpus > 1)
    else:
        assert f"accelerate launch --config_file ds_configs/{engine}.yaml --num_processes {processes} " in line


def test_the_line_keeps_the_overrides_and_sets_what_accelerate_needs_on_cpus(machine: Machine) -> None:
    line = machine.line("--engine", "zero3", "--gpus", "2", "run.name=a b", "--force", "repair.max_steps=3")
    assert line.endswith("-m trainer run recipes/organism/rasa.yaml 'run.name=a b' repair.max_steps=3 --force")
    assert "ACCELERATE_USE_CPU=false DS_ACCELERATOR=cpu OMP_NUM_THREADS=2 accelerate" in line
    assert "ACCELERATE_USE_CPU=true OMP_NUM_THREADS=2 accelerate" in machine.line("--engine", "fsdp2", "--gpus", "2")
    machine.has(2)
    assert "CPU" not in machine.line("--engine", "zero3") and "OMP" not in machine.line("--engine", "zero3")


def test_options_and_overrides_come_in_any_order(machine: Machine) -> None:
    expected = machine.line("run.name=a", "repair.max_steps=3", "--engine", "zero3", "--gpus", "2", "--force")
    assert machine.line("--force", "run.name=a", "--gpus=2", "repair.max_steps=3", "--engine=zero3") == expected


def test_help_says_every_engine_and_starts_nothing(machine: Machine) -> None:
    for asked in ("-h", "--help"):
        assert launching.main([asked]) == 0
        assert ", ".join(TABLE) in " ".join(machine.capsys.readouterr().out.split())


def test_several_nodes_are_told_where_to_meet(machine: Machine) -> None:
    machine.has(8)
    nodes = ("--nodes", "4", "--rank", "3", "--master")
    line = machine.line("--engine", "zero3", *nodes, "node-0:2222")
    assert (
        "--num_processes 32 --num_machines 4 --machine_rank 3 --main_process_ip node-0 --main_process_port 2222"
        in line
    )
    assert "--deepspeed_multinode_launcher standard" in line
    line = machine.line("--engine", "fsdp2", *nodes, "node-0")
    assert "--main_process_port 29500" in line and "deepspeed" not in line


@pytest.mark.parametrize(
    ("gpus", "arguments", "words"),
    [
        (0, [], "no recipe given"),
        (0, ["none.yaml"], "none.yaml: no such file"),
        (0, ["RECIPE", "--engine", "zero9"], "--engine: found 'zero9'; allowed: single, ddp, zero1"),
        (0, ["RECIPE", "--engine"], "--engine: found nothing after it"),
        (0, ["RECIPE", "--fast"], "--fast"),
        (0, ["RECIPE", "second.yaml"], "second.yaml: found after the recipe, expected section.key=value"),
        (0, ["RECIPE", "--gpus", "two"], "--gpus: found 'two', expected a whole number"),
        (0, ["RECIPE", "--rank", "-1"], "--rank: found '-1', expected a whole number"),
        (4, ["RECIPE", "--gpus", "5"], "--gpus: found 5, this machine has 4; ask for at most 4"),
        (0, ["RECIPE", "--gpus", "5"], "no GPU and 4 cores; ask for at most 4"),
        (4, ["RECIPE", "--engine", "single", "--gpus", "4"], "or take --engine ddp"),
        (1, ["RECIPE", "--engine", "fsdp2"], "needs two or more"),
        (1, ["RECIPE", "--nodes", "2", "--rank", "0"], "--master: missing"),
        (1, ["RECIPE", "--master", "a"], "--nodes, --rank: missing"),
        (1, ["RECIPE", "--nodes", "2", "--rank", "2", "--master", "a"], "--rank: found 2 of 2 nodes; allowed: 0 to 1"),
        (1, ["RECIPE", "--nodes", "2", "--rank", "0", "--master", "a:b"], "--master: found 'a:b'"),
        (1, ["RECIPE", "--engine", "ddp", "--config_file", "x.yaml"], "give one"),
        (1, ["RECIPE", "--config_file", "x.yaml"], "x.yaml: no such file"),
        (1, ["RECIPE", "deepspeed.expert_parallel.enabled=true"], "AutoEP replaces whole MoE blocks"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    machine: Machine, recipe_file: Path, gpus: int, arguments: list[str], words: str
) -> None:
    machine.has(gpus)
    assert words in machine.refusal(*(str(recipe_file) if item == "RECIPE" else item for item in arguments))


def test_a_missing_deepspeed_is_named_with_its_remedy(
    machine: Machine, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name))
    assert "pip install 'routealign[gpu]'" in machine.refusal(str(recipe_file), "--engine", "zero2")
    assert "fsdp2.yaml" in machine.line("--engine", "fsdp2", "--gpus", "2")


def test_an_interpreter_without_the_libraries_is_named(
    machine: Machine, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "has no accelerate; run make install, or set PYTHON" in machine.refusal(str(recipe_file))


@pytest.mark.parametrize(
    ("change", "json_change", "words"),
    [
        ({"deepspeed_config": {"deepspeed_config_file": "JSON", "zero_stage": 3}}, {}, "zero_stage beside"),
        ({"mixed_precision": "bf16"}, {}, "mixed_precision beside"),
        ({"deepspeed_config": {"zero_stage": 3}}, {}, "no deepspeed_config_file"),
        ({"deepspeed_config": {"deepspeed_config_file": "gone.json"}}, {}, "gone.json: no such file"),
        ({"distributed_type": "NO"}, {}, "--engine single"),
        ({"num_machines": 2}, {}, "num_machines: found 2, --nodes says 1"),
        ({"num_processes": "8"}, {}, "num_processes: found '8'"),
        ({}, {"expert_parallel": {"enabled": True, "autoep_size": 2}}, "AutoEP replaces whole MoE blocks"),
    ],
)
def test_a_config_of_ones_own_is_checked(
    machine: Machine, recipe_file: Path, change: dict[str, Any], json_change: dict[str, Any], words: str
) -> None:
    file = _own_config(machine, {}, {})
    assert f"--config_file {file} --num_processes 2" in machine.line("--config_file", str(file))
    file = _own_config(machine, change, json_change)
    assert words in machine.refusal(str(recipe_file), "--config_file", str(file))


def _own_config(machine: Machine, change: dict[str, Any], json_change: dict[str, Any]) -> Path:
    settings = machine.tmp / "own.json"
    settings.write_text(json.dumps(json.loads((machine.root / "ds_configs/zero2.json").read_text()) | json_change))
    config = yaml.safe_load((machine.root / "ds_configs/zero2.yaml").read_text()) | {"num_processes": 2}
    config["deepspeed_config"]["deepspeed_config_file"] = "JSON"
    text = yaml.safe_dump(config | change).replace("JSON", str(settings))
    file = machine.tmp / "own.yaml"
    file.write_text(text)
    return file


def test_gpus_are_those_that_the_driver_lists_and_the_user_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launching.gpus_here() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho '  MIG 1g.5gb'\necho 'GPU 1: X (UUID: b)'\n")
    tool.chmod(0o755)
    assert launching.gpus_here() == ["0", "1"]
    for allowed, seen in (("1", ["1"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        assert launching.gpus_here() == seen
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert launching.gpus_here() == []


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ddp", "ACCELERATE_USE_DEEPSPEED=None ACCELERATE_DEEPSPEED_CONFIG_FILE=None ACCELERATE_USE_FSDP=None"),
        ("fsdp2", "ACCELERATE_USE_FSDP=true FSDP_VERSION=2 ACCELERATE_USE_CPU=true"),
        (
            "zero3",
            "ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=ROOT/ds_configs/zero3.json"
            " ACCELERATE_USE_FSDP=None FSDP_VERSION=None ACCELERATE_USE_CPU=false DS_ACCELERATOR=cpu",
        ),
    ],
)
def test_every_worker_learns_its_engine(machine: Machine, engine: str, expected: str) -> None:
    out, _ = machine.start("environment", "--engine", engine, "--gpus", "2").communicate(timeout=60)
    workers = sorted(line for line in out.splitlines() if line.startswith("worker"))
    assert len(workers) == 2
    for rank, worker in enumerate(workers):
        assert (
            worker.startswith(f"worker {rank} WORLD_SIZE=2 ") and expected.replace("ROOT", str(machine.root)) in worker
        )


@pytest.mark.slow
def test_two_nodes_meet(machine: Machine) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        machine.start(
            "environment", "--engine=zero2", "--gpus=1", "--nodes=2", f"--rank={rank}", f"--master=localhost:{port}"
        )
        for rank in (0, 1)
    ]
    for rank, node in enumerate(nodes):
        out, error = node.communicate(timeout=60)
        assert node.returncode == 0, error
        assert f"worker {rank} WORLD_SIZE=2 ACCELERATE_USE_DEEPSPEED=true" in out


@pytest.mark.parametrize(("mode", "code"), [("user", 2), ("fail", 7), ("kill", 128 + signal.SIGKILL)])
def test_the_exit_code_is_that_of_the_worker_that_failed(machine: Machine, mode: str, code: int) -> None:
    started = machine.start(mode, "--engine", "ddp", "--gpus", "2")
    _, error = started.communicate(timeout=60)
    assert started.returncode == code
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error
    assert (
        ("recipe.yaml" in lines[0])
        if mode == "user"
        else (f"rank 1 was the first to fail, exit code {code}" in lines[0])
    )


def test_sigterm_lets_every_worker_save(machine: Machine) -> None:
    started = machine.start("save", "--engine", "zero3", "--gpus", "2")
    assert started.stdout is not None
    seen: list[str] = []
    while len(seen) < 3:  # the printed line, and one line of each worker
        seen.append(started.stdout.readline())
        assert seen[-1], seen
    began = time.monotonic()
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=30)
    assert sorted(out.split()) == ["0", "1", "saved", "saved"]
    assert started.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 15


def test_a_taken_port_is_one_line(machine: Machine) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        nodes = ("--gpus=1", "--nodes=2", "--rank=0", f"--master=localhost:{port}")
        started = machine.start("environment", "--engine=ddp", *nodes)
        _, error = started.communicate(timeout=60)
    assert started.returncode == 2
    assert [line for line in error.splitlines() if "error" in line] == [error.strip()] and "--master" in error


def test_every_engine_has_a_config_that_its_library_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monkeypatch.chdir(root)
    for engine in TABLE:
        config = load_config_from_file(f"ds_configs/{engine}.yaml")
        settings = config.deepspeed_config.get("deepspeed_config_file")
        assert settings == (f"ds_configs/{engine}.json" if engine.startswith("zero") else None)
        if settings:
            given = json.loads(Path(settings).read_text())
            zero = DeepSpeedZeroConfig(**given["zero_optimization"])
            assert zero.stage == int(engine[4]) and not given["bf16"]["enabled"]
            assert (zero.offload_param is not None) == engine.endswith("offload")
            # DeepSpeed's own default names whole MoE blocks; its leaf hook fails above frozen layers (0.19.8).
            assert zero.stage < 3 or not (zero.leaf_module.classes or zero.leaf_module.name_suffixes)
    example = load_config_from_file("ds_configs/multinode-zero3.yaml")
    assert example.num_processes == 8 * example.num_machines and Path(
        example.deepspeed_config["deepspeed_config_file"]
    )


def test_every_key_of_ds_configs_is_explained(root: Path) -> None:
    page = (root / "docs/cluster.md").read_text()
    explained = set(re.findall(r"`([a-z0-9_]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    files = [path for path in (root / "ds_configs").iterdir() if path.suffix in (".json", ".yaml")]
    assert len(files) == 12
    used = {key for file in files for key in _keys(yaml.safe_load(file.read_text()))}
    assert used <= explained, sorted(used - explained)


def _keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _keys(value)
