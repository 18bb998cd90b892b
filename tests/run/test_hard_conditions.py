"""A run folder on a disk that is read-only or full, and two processes that want it at once: one line, nothing lost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_prep.errors import UserError
from tests.run.steps import Load, work
from trainer.run.folder import Run

STEP = """
import sys, time
from pathlib import Path
import trainer.cli.app as cli
from trainer.run.step import JsonFile

class Slow:
    def run(self, opened):
        open(sys.argv[2], "w").write("open")
        while not Path(sys.argv[3]).exists():
            time.sleep(0.02)
        opened.run.step("pairs", lambda: 1, JsonFile(opened.folder / "pairs.json"), inputs="1")

cli._method = lambda recipe: Slow()
cli.main(["run", sys.argv[1]])
"""


def test_of_two_processes_started_at_once_one_runs_and_the_other_says_so(
    recipe_file: Path, tmp_path: Path, root: Path
) -> None:
    go = tmp_path / "go"
    command = [sys.executable, "-c", STEP, str(recipe_file)]
    both = [
        subprocess.Popen([*command, str(tmp_path / name), str(go)], cwd=root, text=True, stderr=subprocess.PIPE)
        for name in "ab"
    ]
    while all(process.poll() is None for process in both):  # the one that comes second leaves at once
        os.sched_yield()
    go.touch()
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    winner, loser = both[codes.index(0)], errors[codes.index(2)]
    assert loser.startswith("error: ") and loser.count("\n") == 1
    assert f"in use by process {winner.pid}" in loser


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A mount where one may be made, else a folder without the right to write (which binds others than root)."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    mounted = _mounted(folder, "ro")
    if not mounted:
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere, and nothing can be mounted here")
        folder.chmod(0o500)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    folder.chmod(0o700)


def _mounted(folder: Path, options: str) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


def in_folder(recipe_file: Path, folder: Path) -> None:
    tree = yaml.safe_load(recipe_file.read_text())
    tree["run"]["output_dir"] = str(folder)
    recipe_file.write_text(yaml.safe_dump(tree))


def test_a_read_only_place_is_one_line_that_names_the_key(load: Load, recipe_file: Path, read_only: Path) -> None:
    in_folder(recipe_file, read_only / "runs")
    with pytest.raises(OSError, match=r"run\.output_dir: the run folder .*runs/first cannot be made") as caught:
        Run.open(load())
    assert "\n" not in str(caught.value)


def test_a_place_below_a_file_is_one_line_that_names_the_key(load: Load, recipe_file: Path) -> None:
    in_folder(recipe_file, Path("/dev/null/runs"))
    with pytest.raises(OSError, match=r"run\.output_dir: the run folder /dev/null/runs/first cannot be made"):
        Run.open(load())


def test_a_full_disk_costs_the_step_and_nothing_that_was_finished(
    load: Load, recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if not _mounted(folder, "size=256k"):
        pytest.skip("nothing can be mounted here; a limit on file sizes stands in, in tests/methods/test_bad_input.py")
    try:
        in_folder(recipe_file, folder)
        with Run.open(load()) as run:
            work(run)
            before = (run.dir / "manifest.json").read_bytes()
            with pytest.raises(OSError, match=r"No space left on device.*pairs\.txt"):
                work(run, inputs="2", content="x" * 2**20)
            assert (run.dir / "manifest.json").read_bytes() == before
            assert not work(run), "the former result is still there"
            assert not list(run.dir.glob(".*.tmp"))
            run.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_value_that_is_refused_changes_no_byte_of_the_folder(load: Load, recipe_file: Path) -> None:
    with Run.open(load()) as run:
        work(run)
    before = {path: path.read_bytes() for path in run.dir.iterdir()}
    with pytest.raises(UserError, match="found inf"):
        load("repair.weight_decay=.inf")
    assert {path: path.read_bytes() for path in run.dir.iterdir()} == before
    with Run.open(load()) as again:
        assert not work(again)
