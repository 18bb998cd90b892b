"""Whole runs in processes of their own: killed with SIGKILL they go on, and two train what one does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from data_prep.organism.build import Organism
from tests.distributed.launching import start
from tests.methods.alignx.test_alignx import tree_of
from trainer.methods.alignx.head.bank import Bank

POINTS = {
    "inside a pass, after a checkpoint": "trainer.training.loop:SaveAndStop.on_step_end:3",
    "between the passes of an axis": "trainer.methods.alignx.stages:train_adapter:2",
    "between two axes": "trainer.methods.alignx.stages:train_adapter:3",
    "while features are read": "trainer.methods.alignx.route:groups_of:1",
    "while the head is fitted": "trainer.methods.alignx.route:fit:1",
}


def recipe(organism: Organism, folder: Path, processes: int = 1) -> Path:
    tree: dict[str, Any] = tree_of(organism, folder)
    tree["axes"] = tree["axes"][:2]
    tree["adapters"]["per_device_train_batch_size"] = 8 // processes
    path = folder / "alignx.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(folder: Path) -> dict[str, Any]:
    """Of every pass, by its name and the weight's."""
    return {
        f"{path.parent.name}.{name}": value
        for path in sorted((folder / "runs" / "small" / "stages").glob("*/state.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.fixture(scope="module")
def undisturbed(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ended = start("single", folder, "trainer", "detect", recipe(organism, folder))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_ends_with_the_same_adapters(
    point: str, organism: Organism, undisturbed: Path, tmp_path: Path
) -> None:
    path = recipe(organism, tmp_path)
    killed = start("single", tmp_path, "tests.distributed.killing", f"{POINTS[point]}:KILL", "detect", path)
    assert killed.returncode == -signal.SIGKILL
    resumed = start("single", tmp_path, "trainer", "detect", path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, found = weights(undisturbed), weights(tmp_path)
    assert expected.keys() == found.keys() and len(expected) > 0
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2"])
def test_two_processes_end_with_the_adapters_and_the_features_of_one(
    engine: str, organism: Organism, undisturbed: Path, tmp_path: Path
) -> None:
    ended = start(engine, tmp_path, "trainer", "detect", recipe(organism, tmp_path, processes=2))
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected, found = weights(undisturbed), weights(tmp_path)
    for name, value in expected.items():
        assert float((found[name].double() - value.double()).norm() / value.double().norm()) < 1e-5, name
    banks = [Bank.load(folder / "runs" / "small" / "bank.safetensors") for folder in (undisturbed, tmp_path)]
    assert banks[0].features_NVD.allclose(banks[1].features_NVD, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_an_engine_that_splits_weights_is_refused_in_one_line(engine: str, organism: Organism, tmp_path: Path) -> None:
    ended = start(engine, tmp_path, "trainer", "detect", recipe(organism, tmp_path, processes=2))
    assert ended.returncode == 2 or "allowed engines: single, ddp, zero1, zero2" in ended.stderr
    assert "method alignx: adapters are put into a whole model" in ended.stderr
