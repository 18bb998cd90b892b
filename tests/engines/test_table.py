"""Engines are named in one room; the rest asks its table, which agrees with ds_configs/ and with what is built."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.distributed.launching import words_of_the_launcher
from trainer.engines import engine as engines
from trainer.engines.table import TABLE, default, names

ROOT = Path(__file__).resolve().parents[2]
NAMED_IN = ("trainer/engines/", "trainer/moe/sharding.py", "trainer/recipe/trainer_arguments.py")
"""The last lists the trainer's own settings, some of which are called after an engine; it asks no engine anything."""
SOURCES = sorted(
    path for path in (ROOT / "trainer").rglob("*.py") if not path.relative_to(ROOT).as_posix().startswith(NAMED_IN)
)
NAME = re.compile(r"zero-?[123]|fsdp|deepspeed|(?<![a-z])ddp(?![a-z])", re.IGNORECASE)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def words_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Identifiers and string constants of code with their lines; strings that only document it are left out."""
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in documents:
                yield line, node.value
            continue
        for _, value in ast.iter_fields(node):
            for found in value if isinstance(value, list) else [value]:
                if isinstance(found, str):
                    yield line, found


def engines_named_in(text: str) -> list[str]:
    return [f"line {line}: {word!r}" for line, word in words_of(ast.parse(text)) if NAME.search(word) or word in TABLE]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_the_room_of_engines_names_one(path: Path) -> None:
    assert engines_named_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "x = 'zero2'",
        "x = f'under {y}, or ZeRO-3'",
        "x = 'single'",
        "from a.deepspeed import b",
        "from a import shard_fsdp2",
        "x.ddp_broadcast_buffers = 1",
        "f(ddp=1)",
        "def _zero3_whole(): ...",
        "def f(fsdp): ...",
        "class DeepSpeedThing: ...",
    ],
)
def test_the_reader_of_names_sees_every_form(code: str) -> None:
    assert engines_named_in(code)


def test_the_reader_of_names_passes_over_texts_and_other_words() -> None:
    code = '"""ZeRO-3."""\nx = 1\n"""Under FSDP2."""\n# ddp\ny = "a single zero"\nmodel.zero_grad()\nzero = "added"\n'
    assert not engines_named_in(code)


@pytest.mark.parametrize("name", TABLE)
def test_an_engine_has_the_config_that_its_capabilities_say(name: str) -> None:
    can, config = TABLE[name], yaml.safe_load((ROOT / f"ds_configs/{name}.yaml").read_text())
    kinds = {
        "NO": can.one_process,
        "DEEPSPEED": can.deepspeed_stage is not None,
        "FSDP": can.splits_parameters and can.deepspeed_stage is None,
    }
    assert [config["distributed_type"]] == ([kind for kind, so in kinds.items() if so] or ["MULTI_GPU"])
    if can.deepspeed_stage is not None:
        zero = json.loads((ROOT / f"ds_configs/{name}.json").read_text())["zero_optimization"]
        assert zero["stage"] == can.deepspeed_stage
        assert ("offload_param" in zero) == ("offload_optimizer" in zero) == can.offloads


def test_every_config_is_of_an_engine_or_explained() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    files = [path for path in (ROOT / "ds_configs").iterdir() if path.suffix == ".yaml"]
    assert TABLE.keys() <= {path.stem for path in files}
    assert [path.name for path in files if path.stem not in TABLE and path.name not in page] == []


@pytest.mark.parametrize("name", TABLE)
def test_the_engine_that_is_built_is_the_one_that_was_launched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(key, raising=False)
    for key, value in words_of_the_launcher(name, tmp_path).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(engines, "from_rank_0", lambda value: value)
    monkeypatch.setattr(engines, "world_size", lambda: 1 if TABLE[name].one_process else 2)
    built = engines.engine.__wrapped__()
    assert built.name == name and built.capabilities == TABLE[name]
    assert bool(built.zero_config) == (TABLE[name].deepspeed_stage is not None)


def test_names_come_from_the_cheapest_to_the_dearest() -> None:
    assert names(lambda e: not e.splits_parameters) == ("single", "ddp", "zero1", "zero2")
    assert names(lambda e: e.splits_parameters) == ("fsdp2", "zero3", "zero3-offload")
    assert names(lambda e: not e.splits_optimiser_states) == ("single", "ddp")
    assert names(lambda e: not e.steps_with_bitsandbytes) == ("fsdp2",)


def test_the_engine_of_a_launch_that_names_none_keeps_the_model_whole() -> None:
    chosen = [default(processes, gpus=gpus) for processes in (1, 2) for gpus in (False, True)]
    assert chosen == ["single", "single", "ddp", "zero2"]
    assert not any(TABLE[name].splits_parameters for name in chosen)


def test_the_launcher_imports_nothing_heavy() -> None:
    code = "import sys, trainer.cli.launch; print({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
