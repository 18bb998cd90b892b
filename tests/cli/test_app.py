import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import __version__
from trainer.cli import app as cli
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.pipeline.experiment import Opened

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the command; exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the method's module: the command's own work is what is tested here."""
    stand_in = SimpleNamespace(run=lambda opened: None, detect=lambda opened: None)
    monkeypatch.setattr(cli, "_method", lambda recipe: stand_in)
    return stand_in


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], ["rum"]),
        (["run"], ["RECIPE"]),
        (["run", "--frce"], ["--frce"]),
        (["run", "none.yaml"], ["none.yaml", "no such file"]),
        (["run", "."], [".", "is a folder"]),
        (["run", "RECIPE", "detect.tokns=both"], ["detect.tokns", "did you mean 'tokens'"]),
        (["run", "RECIPE", "oops"], ["'oops'", "section.key=value"]),
        (["detect", "RECIPE", "detect.top_k=-1"], ["detect.top_k", "-1"]),
        (["detect", "none.yaml"], ["none.yaml"]),
        (["evaluate", "some/model"], ["--suite"]),
        (["evaluate", "some/model", "--suite", "none.yaml"], ["none.yaml"]),
        (["inspect"], ["MODEL"]),
        (["inspect", ""], ["inspect: found no model", "Hub id or a local folder"]),
        (["evaluate", " ", "--suite", "RECIPE"], ["evaluate: found no model"]),
        (["steer", "", "--experts", "x.json", "--prompt", "x"], ["steer: found no model"]),
        (["inspect", "no/such/folder"], ["no/such/folder"]),
        (["report", "no-such-run"], ["no-such-run", "not a run folder"]),
        (["export", "no-such-run"], ["no-such-run", "not a run folder"]),
        (["judge", "no-such-run"], ["no-such-run", "not a run folder"]),
        (["judge", "no-such-run", "--inspect-log"], ["no-such-run", "not a run folder"]),
        (["judge", "no-such-run", "--with", "frases"], ["evaluate.judge", "did you mean 'phrases'"]),
    ],
)
def test_a_users_mistake(main: Main, recipe_file: Path, arguments: list[str], words: list[str]) -> None:
    given = [str(recipe_file) if item == "RECIPE" else item for item in arguments]
    assert_one_line(main(*given), *words)


def test_a_foreign_folder(main: Main, recipe_file: Path, tmp_path: Path, method: SimpleNamespace) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "x").write_text("")
    assert_one_line(main("run", str(recipe_file)), "first", "no run folder", "run.name")
    assert_one_line(main("run", str(recipe_file), "--force"), "no run folder")


def test_run_gives_the_method_the_recipe_and_the_folder(
    main: Main, recipe_file: Path, method: SimpleNamespace
) -> None:
    seen: list[Opened[RasaRecipe]] = []
    method.run = seen.append
    code, _, err = main("run", str(recipe_file), "run.seed=4", "--force", "detect.top_k=3")
    assert (code, err) == (0, "")
    assert seen[0].recipe.run.seed == 4 and seen[0].recipe.detect.top_k == 3
    assert (seen[0].folder / "manifest.json").exists()
    assert main("run", str(recipe_file), "run.seed=4")[0] == 0, "the folder is free again"


def test_errors_of_the_method_become_one_line(main: Main, recipe_file: Path, method: SimpleNamespace) -> None:
    def fails(error: Exception) -> Callable[[object], None]:
        def run(opened: object) -> None:
            raise error

        return run

    method.run = fails(ValueError("first line\n   second line"))
    assert_one_line(main("run", str(recipe_file)), "first line second line")
    method.run = fails(OSError(28, "No space left on device", "pairs.jsonl"))
    assert_one_line(main("run", str(recipe_file)), "No space left on device", "pairs.jsonl")
    method.run = fails(ValueError())
    assert_one_line(main("run", str(recipe_file)), "ValueError")
    method.run = fails(RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["run", str(recipe_file)])


@pytest.mark.parametrize("where", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(main: Main, where: int) -> None:
    arguments = ["run", "none.yaml"]
    arguments.insert(where, "--debug")
    code, _, err = main(*arguments)
    assert code == 2
    assert "Traceback" in err and "UserError" in err


def test_an_interrupt_leaves_with_130(main: Main, recipe_file: Path, method: SimpleNamespace) -> None:
    def interrupted(opened: object) -> None:
        raise KeyboardInterrupt

    method.run = interrupted
    assert main("run", str(recipe_file))[0] == 130


def test_other_ranks_say_who_they_are(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main("run", "none.yaml")[2].startswith("error: [rank 3] ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["--version"]])
def test_help_is_answered_without_loading_torch(root: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from trainer.cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as left: assert not left.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: routealign" in done.stdout or __version__ in done.stdout


def test_python_m_trainer_is_the_command(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "rum"], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'rum'")


def test_launch_prints_what_it_runs_and_returns_its_exit_code(root: Path, recipe_file: Path) -> None:
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [str(root / "launch.sh"), str(recipe_file), "--engine=single", "detect.top_k=0"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "detect.top_k" in done.stderr
    assert done.stdout.startswith("+ ") and done.stdout.rstrip().endswith("detect.top_k=0")
