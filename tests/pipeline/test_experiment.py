"""What a step of an experiment rests on: the sections it reads, and every file that these name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.methods.table import load_recipe
from trainer.pipeline.experiment import Experiment, JsonFile
from trainer.recipe.schema import Recipe
from trainer.run.folder import Run

Touch = Callable[[Path], object]


@pytest.fixture
def recipe_of(tree: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """A steering recipe whose data, model and pairs are files and folders that are there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("harmful", "benign", "borderline", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    for name in ("harmful", "benign", "borderline"):
        tree["data"][name]["path"] = str(tmp_path / f"{name}.jsonl")
    tree["model"]["name_or_path"] = str(model)
    tree |= {"method": "steermoe", "steer": {"contrast": "custom", "pairs": str(tmp_path / "pairs.jsonl")}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return lambda *overrides: load_recipe(file, overrides)


def made(recipe: Recipe, *reads: str) -> bool:
    """Whether a step that reads these sections had to be made."""
    calls: list[int] = []
    with Run.open(recipe) as run:
        anything: Any = None
        experiment = Experiment(recipe, run, anything, anything, anything, anything, anything)
        experiment.step("found", lambda: calls.append(1), JsonFile(run.dir / "found.json"), reads=reads)
    return bool(calls)


@pytest.mark.parametrize("file", ["harmful.jsonl", "benign.jsonl", "model/config.json", "pairs.jsonl"])
def test_a_changed_file_that_a_read_section_names_makes_the_step_again(
    recipe_of: Callable[..., Recipe], tmp_path: Path, file: str
) -> None:
    recipe = recipe_of()
    assert made(recipe, "steer") and not made(recipe, "steer")
    (tmp_path / file).write_text("{} ")
    assert made(recipe, "steer") and not made(recipe, "steer")


def test_what_a_step_does_not_read_may_change(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    assert made(recipe_of(), "evaluate")
    (tmp_path / "pairs.jsonl").write_text("{} ")
    assert not made(recipe_of(), "evaluate"), "the file of another section"
    assert not made(recipe_of("steer.strength=0.5"), "evaluate")
    assert made(recipe_of("evaluate.batch_size=3"), "evaluate")


def test_a_single_key_may_be_read(recipe_of: Callable[..., Recipe]) -> None:
    assert made(recipe_of(), "steer.strength")
    assert not made(recipe_of("steer.sweep.strength=[0.5]"), "steer.strength")
    assert made(recipe_of("steer.strength=0.5"), "steer.strength")
