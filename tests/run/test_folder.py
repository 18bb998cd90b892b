import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from tests.run.steps import Load, interrupted, manifest, work
from trainer.methods.table import load_recipe, recipe_of
from trainer.run.folder import Run, model_of
from trainer.run.step import Kept
from trainer.runtime.files import atomic_write, replacing, save_tensors, write_tensors


def test_a_new_run(opened: Run, load: Load) -> None:
    written = manifest(opened)
    assert written["name"] == "first" and written["seed"] == 0 and written["recipe_hash"] == load().hash()
    assert {"routealign", "python", "platform", "torch", "transformers", "peft", "trl", "accelerate"} == set(
        written["versions"]
    )
    assert load_recipe(opened.dir / "recipe.yaml") == load()
    assert opened.stage_dir(2, "repair") == opened.dir / "stages" / "2-repair"


def test_a_finished_stage_is_recorded_and_kept(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(load()) as run:
        assert work(run)
        record = manifest(run)["stages"]["pairs"]
        assert record["status"] == "finished" and list(record["outputs"]) == ["pairs.txt"]
        assert record["seconds"] >= 0 and record["peak_memory_mb"] > 1
    with Run.open(load()) as run:
        assert not work(run)
    assert "pairs: done before, kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run.dir / "pairs.txt").unlink(), "pairs.txt is missing"),
        (lambda run: (run.dir / "pairs.txt").write_text("y"), "pairs.txt was changed"),
    ],
)
def test_why_a_stage_runs_again(
    load: Load, capsys: pytest.CaptureFixture[str], spoil: Callable[[Run], object], reason: str
) -> None:
    with Run.open(load()) as run:
        work(run)
        spoil(run)
    with Run.open(load()) as run:
        assert work(run)
    assert f"pairs: runs again: {reason}" in capsys.readouterr().out


def test_a_stage_that_was_interrupted_runs_again(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(load()) as run:
        interrupted(run)
    with Run.open(load()) as run:
        assert work(run)
    assert "pairs: runs again: it was interrupted" in capsys.readouterr().out


def test_a_stage_with_other_inputs_runs_again(opened: Run, capsys: pytest.CaptureFixture[str]) -> None:
    work(opened)
    assert work(opened, inputs="2")
    assert "pairs: runs again: its inputs changed" in capsys.readouterr().out


def test_a_stage_runs_again_only_where_what_it_builds_on_changed(
    opened: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    work(opened)
    assert work(opened, name="repair", after=["pairs"])
    assert not work(opened, name="repair", after=["pairs"])
    (opened.dir / "pairs.txt").unlink()
    assert work(opened)
    assert not work(opened, name="repair", after=["pairs"]), "the same output came out again"
    (opened.dir / "pairs.txt").unlink()
    work(opened, content="other")
    assert work(opened, name="repair", after=["pairs"])
    assert "repair: runs again: what it builds on changed (pairs)" in capsys.readouterr().out


def test_a_folder_as_output(opened: Run) -> None:
    def write(_: None) -> None:
        (opened.dir / "model" / "sub").mkdir(parents=True)
        (opened.dir / "model" / "a.txt").write_text("a")
        (opened.dir / "model" / "sub" / "b.txt").write_text("b")

    opened.step("export", lambda: None, Kept(write, lambda: [opened.dir / "model"], lambda: None), inputs="1")
    assert list(manifest(opened)["stages"]["export"]["outputs"]) == ["model/a.txt", "model/sub/b.txt"]


def test_an_output_that_was_not_written(opened: Run) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        nothing = Kept(lambda _: None, lambda: [opened.dir / "nothing.txt"], lambda: None)
        opened.step("pairs", lambda: None, nothing, inputs="1")
    assert manifest(opened)["stages"]["pairs"]["status"] == "started"


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.harmful.train=9", "data.harmful.train: 8 -> 9"),
        ("model.name_or_path=x", "model.name_or_path: 'some/model' -> 'x'"),
        ("run.seed=1", "run.seed: 0 -> 1"),
    ],
)
def test_a_folder_of_another_recipe(load: Load, override: str, shown: str) -> None:
    with Run.open(load()) as run:
        work(run, "1", "detect")
    with pytest.raises(UserError, match="another recipe") as caught:
        Run.open(load(override))
    line = str(caught.value)
    assert shown in line and "--force" in line and "run.name" in line and "\n" not in line
    Run.open(load()).close()


def test_a_first_try_that_finished_nothing_does_not_block_the_corrected_recipe(load: Load) -> None:
    with Run.open(load()) as run:
        interrupted(run, "detect")
    with Run.open(load("data.harmful.train=9")) as run:
        assert manifest(run)["stages"] == {}


def test_later_sections_may_change(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(load()) as run:
        work(run, run.recipe.hash("data"), "detect")
        work(run, run.recipe.hash("data", "evaluate"), "evaluate")
    changed = load("evaluate.batch_size=3", "repair.max_steps=5")
    with Run.open(changed) as run:
        assert not work(run, run.recipe.hash("data"), "detect")
        assert work(run, run.recipe.hash("data", "evaluate"), "evaluate")
        assert load_recipe(run.dir / "recipe.yaml") == changed
    out = capsys.readouterr().out
    assert "the recipe changed: evaluate.batch_size: 64 -> 3" in out
    assert "the recipe changed: repair.max_steps: None -> 5" in out
    assert "evaluate: runs again: its inputs changed" in out


def test_force_empties_a_run_folder_and_nothing_else(load: Load, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    with Run.open(load()) as run:
        work(run)
        run.stage_dir(1, "repair")
        (run.dir / "link").symlink_to(outside)
    with Run.open(load("run.seed=3"), force=True) as run:
        assert sorted(p.name for p in run.dir.iterdir()) == [".lock", "manifest.json", "recipe.yaml"]
        assert work(run)
    assert (outside / "kept.txt").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_run_stays_as_it_is(load: Load, force: bool) -> None:
    folder = load().folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"no run folder \(no manifest\.json\)"):
        Run.open(load(), force=force)
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"name": "their web app"}', '{"format": "routealign-run-9"}', "\x00\xff"],
)
def test_a_damaged_or_foreign_manifest(load: Load, text: str, force: bool) -> None:
    folder = load().folder
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of RouteAlign, or damaged") as caught:
        Run.open(load(), force=force)
    assert "\n" not in str(caught.value)
    assert (folder / "manifest.json").read_text() == text


def test_a_truncated_manifest(load: Load) -> None:
    Run.open(load()).close()
    path = load().folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged"):
        Run.open(load())


def test_a_file_in_the_way(load: Load) -> None:
    load().folder.parent.mkdir(parents=True)
    load().folder.write_text("")
    with pytest.raises(UserError, match="is a file"):
        Run.open(load())


@pytest.mark.parametrize("name", ["recipe.yaml", "pairs.txt"])
def test_a_folder_where_a_file_of_the_run_belongs_is_refused_by_name(name: str, load: Load) -> None:
    with Run.open(load()) as run:
        if name == "recipe.yaml":
            (run.dir / name).unlink()
        (run.dir / name).mkdir()
        with pytest.raises(UserError, match=rf"{name}: is a folder, expected a file or nothing; remove it"):
            work(run)
        assert (run.dir / name).is_dir() and not list(run.dir.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["stages", "model"])
def test_a_file_where_a_folder_of_the_run_belongs_is_refused_before_anything_runs(name: str, load: Load) -> None:
    with Run.open(load()) as run:
        work(run)
    (run.dir / name).write_text("mine")
    for start in (lambda: Run.open(load()), lambda: Run.reopen(run.dir, recipe_of)):
        with pytest.raises(UserError, match=rf"{name}: is no folder, expected one that a run made, or nothing"):
            start()
    assert (run.dir / name).read_text() == "mine"


def test_a_manifest_of_a_version_with_other_keys(load: Load) -> None:
    with Run.open(load()) as run:
        run.manifest.recipe["detect"]["gone"] = 1
        run.manifest.versions["routealign"] = "0.0.1"
        run.write_manifest()
    with pytest.raises(UserError, match=r"of version 0\.0\.1, --force starts anew: detect\.gone: unknown key"):
        Run.open(load())
    Run.open(load(), force=True).close()


def test_a_second_run_is_refused_until_the_first_ends(load: Load) -> None:
    first = Run.open(load())
    for force in (False, True):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            Run.open(load(), force=force)
    first.close()
    Run.open(load()).close()


def test_a_killed_process_frees_the_folder(load: Load, recipe_file: Path, root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from trainer.methods.table import load_recipe; from trainer.run.folder import Run\n"
        "run = Run.open(load_recipe(Path(sys.argv[1])))\n"
        "print('open', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe_file)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    with pytest.raises(UserError, match=f"in use by process {child.pid}"):
        Run.open(load())
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Run.open(load()) as run:
        assert work(run)


def test_reopening_from_the_folder_alone(load: Load, tmp_path: Path) -> None:
    with Run.open(load()) as run:
        work(run)
    run.dir.rename(tmp_path / "moved")
    with Run.reopen(tmp_path / "moved", recipe_of) as run:
        assert run.recipe == load() and not work(run)
    with pytest.raises(UserError, match="not a run folder"):
        Run.reopen(tmp_path / "nothing", recipe_of)


def test_a_run_of_a_former_release_is_recognised_and_refused_in_one_line(load: Load) -> None:
    with Run.open(load()) as run:
        work(run)
    path = run.dir / "manifest.json"
    path.write_text(path.read_text().replace("routealign-run-2", "routealign-run-1"))
    for attempt in (lambda: Run.open(load()), lambda: Run.reopen(run.dir, recipe_of)):
        with pytest.raises(UserError, match="begun by a former release") as caught:
            attempt()
        line = str(caught.value)
        assert "--force" in line and "run.name" in line and "\n" not in line
    assert (run.dir / "pairs.txt").exists(), "nothing of the old run is lost"
    with Run.open(load(), force=True) as anew:
        assert work(anew)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "folder", "fifo"])
def test_a_lock_leaves_a_file_alone_that_its_name_points_to(load: Load, tmp_path: Path, kind: str) -> None:
    precious, lock = tmp_path / "precious", load().folder / ".lock"
    precious.write_text("precious")
    lock.parent.mkdir(parents=True)
    make = {"symbolic link": lock.symlink_to, "hard link": lock.hardlink_to}
    make.get(kind, lambda _: lock.mkdir() if kind == "folder" else os.mkfifo(lock))(precious)
    with pytest.raises(UserError, match=r"\.lock: (is no file|holds something else)"):
        Run.open(load())
    assert precious.read_text() == "precious"


def test_a_lock_in_use_that_holds_no_process_id(load: Load) -> None:
    with Run.open(load()) as run:
        (run.dir / ".lock").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="in use by process unknown"):
            Run.open(load())


def test_the_model_of_a_run(load: Load) -> None:
    with Run.open(load()) as run:
        assert model_of("owner/name") == "owner/name"
        with pytest.raises(UserError, match="holds no model/"):
            model_of(str(run.dir))
        (run.dir / "model").mkdir()
        assert model_of(str(run.dir)) == str(run.dir / "model")


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(opened: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    work(opened)
    before = (opened.dir / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            work(opened, name="repair")
        assert caught.value.filename and "manifest.json" in caught.value.filename
    assert (opened.dir / "manifest.json").read_bytes() == before
    assert not list(opened.dir.glob(".*.tmp"))
    assert not work(opened)


def test_weights_may_be_read_by_those_who_may_read_any_new_file(tmp_path: Path) -> None:
    """safetensors 0.8 would keep everyone else out, whatever the umask says."""
    (tmp_path / "any.json").write_text("{}")
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    write_tensors(tmp_path / "shard.safetensors", {"a": torch.zeros(2)}, {"format": "pt"})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    atomic_write(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


TWO_RANKS = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from tests.run.steps import Load, interrupted, manifest, work
from trainer.methods.table import load_recipe, recipe_of
from trainer.run.folder import Run
from trainer.run.step import JsonFile

with Run.open(load_recipe(Path(sys.argv[1]))) as run:
    assert dist.get_world_size() == 2, "two processes that know of each other"
    kept, made = JsonFile(run.dir / "pairs.json"), []
    first = run.step("pairs", lambda: made.append(1) or os.environ["RANK"], kept, inputs="1")
    done = not made
    again = run.step("pairs", lambda: made.append(1), kept, inputs="1")
    assert first.value == again.value == "0", "what rank 0 made, on every rank"
    same = first.record.digest == again.record.digest
    Path(sys.argv[2], f"{os.environ['RANK']}.txt").write_text(f"{done} {len(made) < 2} {same}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree(recipe_file: Path, tmp_path: Path, root: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for expected in ("False True True", "True True True"):
        done = subprocess.run(
            [*torchrun, str(tmp_path / "two.py"), str(recipe_file), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [expected, expected]
        assert done.stdout.count("done before") <= 3
