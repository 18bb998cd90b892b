"""A run that is killed anywhere goes on where it was, and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.distributed.launching import start
from tests.distributed.test_parity import distance

# module:function:call, counted on rank 0, which kills itself right before it.
POINTS = {
    "while pairs are built": "trainer.methods.rasa.identify:build_pairs:1",
    "while activations are counted": "trainer.methods.rasa.identify:count_activations:1",
    "between two files of detection": "trainer.pipeline.detected:plots.save_heat_map:1",
    "before detection is finished": "trainer.run.folder:Run.write_manifest:2",
    "in the first evaluation": "trainer.evaluation.suite:Suite.measure:1",
    "before the answers to retain are kept": "trainer.methods.rasa.mix:atomic_write:1",
    "before the first checkpoint": "trainer.training.loop:SaveAndStop.on_step_end:1",
    "in the first checkpoint": "trainer.training.resume:save_tensors:2",
    "after a checkpoint": "trainer.training.loop:SaveAndStop.on_step_end:3",
    "while an older checkpoint is removed": "trainer.training.resume:shutil.rmtree:3",
    "before trained experts are saved": "trainer.pipeline.train:save_tensors:1",
    "before repair is finished": "trainer.run.folder:Run.write_manifest:8",
    "in the consistency stage": "trainer.training.loop:SaveAndStop.on_step_end:9",
    "in the second evaluation": "trainer.evaluation.suite:Suite.measure:2",
    "in a file of the export": "trainer.release.export:bits:40",
    "between two files of the export": "trainer.release.export:copy_other_files:1",
    "while the checkpoint is audited": "trainer.pipeline.publish:audit_files:1",
    "before the patch": "trainer.pipeline.publish:write_patch:1",
    "before the report": "trainer.pipeline.publish:html.write:1",
}
FAST = {
    ("single", "after a checkpoint"),
    ("single", "in the consistency stage"),
    ("single", "in a file of the export"),
    ("zero3", "in the consistency stage"),
}
MATRIX = [
    pytest.param(engine, point, marks=[] if (engine, point) in FAST else pytest.mark.slow)
    for engine in ("single", "zero2", "zero3")
    for point in POINTS
]

Launch = Callable[..., subprocess.CompletedProcess[str]]
Started = subprocess.CompletedProcess[str]


def recipe_for(small: Callable[..., Path], engine: str, **more: Any) -> Path:
    share = 1 if engine == "single" else 2
    return small(
        repair__max_steps=6,
        repair__save_steps=2,
        repair__per_device_train_batch_size=8 // share,
        consistency__max_steps=4,
        consistency__save_steps=2,
        consistency__per_device_train_batch_size=4 // share,
        **more,
    )


def run(engine: str, folder: Path, recipe: Path, kill: str = "", **more: Any) -> Started:
    module, first = ("tests.distributed.killing", [kill]) if kill else ("trainer", [])
    return start(engine, folder, module, *first, "run", recipe, **more)


def weights_of(runs: Path) -> dict[str, Any]:
    return load_file(runs / "small" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """The `runs` folder of a run that nothing disturbed, made once per engine."""
    done: dict[str, Path] = {}

    def make(engine: str, recipe: Path) -> Path:
        if engine not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-whole")
            own = folder / "recipe.yaml"
            text = recipe.read_text()
            (line,) = (line for line in text.splitlines() if "output_dir:" in line)
            own.write_text(text.replace(line, f"  output_dir: {folder / 'runs'}"))
            finished = run(engine, folder, own)
            assert finished.returncode == 0, finished.stderr[-3000:]
            done[engine] = folder / "runs"
        return done[engine]

    return make


@pytest.mark.parametrize(("engine", "point"), MATRIX)
def test_a_killed_run_ends_with_the_same_weights(
    engine: str, point: str, small: Callable[..., Path], uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(small, engine)
    expected = weights_of(uninterrupted(engine, recipe))
    killed = run(engine, tmp_path, recipe, kill=f"{POINTS[point]}:KILL")
    assert killed.returncode in (-signal.SIGKILL, 1), "the process was to be killed"
    assert not (tmp_path / "runs" / "small" / "report.html").exists()
    resumed = run(engine, tmp_path, recipe)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found = weights_of(tmp_path / "runs")
    assert distance(found, expected) <= (0 if engine == "single" else 1e-6)
    stages = json.loads((tmp_path / "runs" / "small" / "manifest.json").read_text())["stages"]
    assert all(stage["status"] == "finished" for stage in stages.values())
    assert not list((tmp_path / "runs" / "small").rglob("*checkpoint-*"))


def test_training_goes_on_from_the_checkpoint_and_not_from_the_start(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(small, "single")
    run("single", tmp_path, recipe, kill=f"{POINTS['after a checkpoint']}:KILL")
    folder = tmp_path / "runs" / "small" / "stages" / "1-repair-1"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = run("single", tmp_path, recipe)
    assert "repair from step 2: 4 ..." in resumed.stderr


@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_sigterm_in_training_saves_and_leaves_with_143(
    engine: str, small: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(small, engine)
    ended = run(engine, tmp_path, recipe, kill="trainer.training.loop:SaveAndStop.on_step_end:3:TERM")
    # torch.distributed.run turns every code into 1; launch.sh returns the worker's own (tests/cli/test_launch.py).
    assert ended.returncode == (143 if engine == "single" else 1)
    assert "the same command goes on from here" in ended.stdout
    folder = tmp_path / "runs" / "small" / "stages" / "1-repair-1"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


def test_another_number_of_processes_is_refused_in_the_middle_of_a_stage(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(small, "ddp")
    run("ddp", tmp_path, recipe, kill=f"{POINTS['after a checkpoint']}:KILL")
    refused = run("single", tmp_path, recipe)
    assert refused.returncode == 2
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert "interrupted under 2 processes, found 1; go on with 2, or remove" in line


@pytest.mark.slow
def test_another_engine_is_refused_in_the_middle_of_a_stage(small: Callable[..., Path], tmp_path: Path) -> None:
    """ZeRO-2 and FSDP2 cut the optimiser's states otherwise; the same engine goes on afterwards."""
    recipe = recipe_for(small, "zero2")
    run("zero2", tmp_path, recipe, kill=f"{POINTS['after a checkpoint']}:KILL")
    refused = run("fsdp2", tmp_path, recipe)
    assert refused.returncode == 1, "torch.distributed.run's code for any failure"
    lines = [line for line in refused.stderr.splitlines() if "error: " in line and "optimiser states" in line]
    assert lines and "are those of zero2, found fsdp2; go on with zero2, or remove" in lines[0]
    resumed = run("zero2", tmp_path, recipe)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "repair from step 2: 4 ..." in resumed.stderr


def test_finished_stages_are_kept_under_another_number_of_processes(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(small, "ddp")
    run("ddp", tmp_path, recipe, kill=f"{POINTS['before the patch']}:KILL")
    finished = run("single", tmp_path, recipe)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "consistency-1: done before, kept" in finished.stdout


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_not_taken_up(small: Callable[..., Path], tmp_path: Path) -> None:
    run("single", tmp_path, recipe_for(small, "single"), kill=f"{POINTS['after a checkpoint']}:KILL")
    changed = run("single", tmp_path, recipe_for(small, "single", repair__learning_rate=1e-4))
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert "made by another recipe or model, removed" in changed.stdout
    assert "repair: 6 ..." in changed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_what_was_trained_in_parts_is_what_is_exported(
    lora_rank: int | None, small: Callable[..., Path], tmp_path: Path
) -> None:
    """Under FSDP2; the kills above show it under ZeRO-3. The audit of the run itself holds one against the other."""
    recipe = recipe_for(small, "fsdp2")
    tree = yaml.safe_load(recipe.read_text())
    tree["repair"]["lora_rank"] = lora_rank
    recipe.write_text(yaml.safe_dump(tree))
    done = run("fsdp2", tmp_path, recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    audit = json.loads((tmp_path / "runs/small/audit.json").read_text())
    assert audit["not_as_trained"] == [] and audit["reload_ok"] and audit["experts_changed"] == 8
