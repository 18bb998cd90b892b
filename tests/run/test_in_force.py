"""Which recipe and which steps of a run folder are in force: a replacement counts once it is complete."""

import json

import pytest

from data_prep.errors import UserError
from tests.run.steps import Load, interrupted, manifest, work
from trainer.methods.table import load_recipe
from trainer.run.folder import Run
from trainer.run.manifest import Manifest


def whole(run: Run, name: str = "pairs") -> bool:
    """One step that reads the section `repair`, and the run's end; whether there was anything to do."""
    made = work(run, run.recipe.hash("repair"), name)
    run.settle()
    return made


def test_a_replacement_that_fails_leaves_step_recipe_and_manifest_as_they_were(load: Load) -> None:
    with Run.open(load()) as run:
        assert whole(run)
    before = {path.name: path.read_bytes() for path in run.dir.iterdir() if path.name != ".lock"}
    with Run.open(load("repair.max_steps=5")) as run:
        interrupted(run, inputs=run.recipe.hash("repair"))
    assert {path.name: path.read_bytes() for path in run.dir.iterdir() if path.name != ".lock"} == before
    with Run.open(load()) as run:
        assert not whole(run)


def test_a_recipe_comes_into_force_with_the_first_step_that_completes_under_it(load: Load) -> None:
    with Run.open(load()) as run:
        whole(run)
    changed = load("repair.max_steps=5")
    with Run.open(changed) as run:
        assert manifest(run)["recipe"]["repair"].get("max_steps") is None
        work(run, run.recipe.hash("repair"))
        assert load_recipe(run.dir / "recipe.yaml") == changed
        found = Manifest.read(run.dir)
        assert found.recipe == changed.tree() and found.stages["pairs"].recipe_hash == changed.hash()
        with pytest.raises(UserError, match="do not belong together"):
            found.require_settled(run.dir)
        run.settle()
    Manifest.read(run.dir).require_settled(run.dir)


def test_a_recipe_that_changes_no_step_comes_into_force_when_the_run_ends(load: Load) -> None:
    with Run.open(load()) as run:
        whole(run)
    changed = load("evaluate.batch_size=3")
    with Run.open(changed) as run:
        assert not work(run, run.recipe.hash("repair"))
        assert Manifest.read(run.dir).recipe == load().tree()
        run.settle()
    found = Manifest.read(run.dir)
    assert found.recipe == changed.tree() and list(found.current) == ["pairs"] and not found.mixed


def test_a_step_that_only_an_attempt_began_is_none_of_the_recipe_in_force(load: Load) -> None:
    with Run.open(load()) as run:
        whole(run)
    with Run.open(load("repair.max_steps=5")) as run:
        interrupted(run, "control")
    found = Manifest.read(run.dir)
    assert list(found.current) == ["pairs"] and found.stages["control"].status == "started"
    found.require_settled(run.dir)


def test_a_folder_where_a_step_wrote_a_file_is_refused_before_anything_is_made_again(load: Load) -> None:
    with Run.open(load()) as run:
        work(run)
        (run.dir / "pairs.txt").unlink()
        (run.dir / "pairs.txt").mkdir()
        with pytest.raises(UserError, match=r"pairs\.txt: is a folder, expected the file"):
            work(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outputs", {"../../etc/passwd": "0"}),
        ("outputs", {"/etc/passwd": "0"}),
        ("outputs", {"a\0b": "0"}),
        ("seconds", -1),
        ("seconds", "soon"),
        ("status", "nearly"),
        ("inputs", None),
    ],
)
def test_a_manifest_with_a_wrong_record_is_refused_by_key(load: Load, key: str, value: object) -> None:
    with Run.open(load()) as run:
        work(run)
    path = run.dir / "manifest.json"
    changed = json.loads(path.read_text())
    changed["stages"]["pairs"][key] = value
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"manifest\.json: .*stages\.pairs\.{key}") as caught:
        Run.open(load())
    assert "\n" not in str(caught.value)


def test_a_manifest_whose_recipe_holds_no_number_is_refused_by_key(load: Load) -> None:
    Run.open(load()).close()
    path = load().folder / "manifest.json"
    path.write_text(path.read_text().replace('"bootstrap": 200', '"bootstrap": NaN'))
    with pytest.raises(UserError, match=r"manifest\.json: .*detect\.bootstrap: found nan"):
        Run.open(load())
