"""Imports run one way, down the floors of docs/architecture.md, and files stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# From the top down. A room may import rooms of lower floors, never one of its own floor.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"methods"},
    {"steered", "steered_replies"},
    {"evidence"},
    {"subject"},
    {"detection", "stages", "evaluation", "export", "patch", "hub", "preflight", "planning", "engine"},
    {"moe"},
]
# Any floor above `moe` may import these; they import each other and data_prep, nothing else of ours.
LEAVES = {
    "chat",
    "checkpoint_files",
    "console",
    "launching",
    "loading",
    "portable",
    "recipe",
    "recipe_errors",
    "recipe_steer",
    "recipe_trainer_args",
    "recipe_yaml",
    "reporting",
    "run",
    "run_files",
    "run_process",
    "signals",
}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

SOURCES = sorted(path for package in ("trainer", "data_prep") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules and names of ours that a file imports, wherever in the file."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("trainer", "data_prep"))


def room_of(name: str) -> str | None:
    """`moe` for `trainer.moe.backbone`; None for names of the package itself, such as `trainer.__version__`."""
    parts = name.split(".")
    if len(parts) < 2:
        return None
    at = ROOT / parts[0] / parts[1]
    return parts[1] if at.is_dir() or at.with_suffix(".py").exists() else None


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_run_down(path: Path) -> None:
    package, *inside = module_of(path).split(".")
    here = inside[0] if inside else None
    for name in imports_of(path):
        if package == "data_prep":
            assert name.split(".")[0] == "data_prep", f"data_prep yields records and never imports {name}"
            continue
        if here == "moe":
            assert name.startswith("trainer.moe"), f"moe is usable alone and never imports {name}"
            continue
        room = room_of(name) if name.startswith("trainer.") else None
        if room is None or here is None:
            continue
        for known in (here, room):
            assert known in FLOOR or known in LEAVES, (
                f"trainer/{known} has no floor yet: say which, here and in the docs"
            )
        if room == here:
            if here == "methods":
                own = inside[1:2]
                assert name.split(".")[2:3] == own, f"a method never imports another: {name}"
        elif here in LEAVES:
            assert room in LEAVES, f"{here} is a leaf and never imports {name}"
        elif room not in LEAVES:
            assert FLOOR[here] < FLOOR[room], f"{here} is not above {room}: {name}"


def test_the_leaves_have_no_circle() -> None:
    below = {
        leaf: {
            room
            for path in SOURCES
            if module_of(path).split(".")[:2] == ["trainer", leaf]
            for name in imports_of(path)
            if (room := room_of(name)) in LEAVES and name.startswith("trainer.") and room != leaf
        }
        for leaf in LEAVES
    }
    while below:
        free = {leaf for leaf, needs in below.items() if not needs & below.keys()}
        assert free, f"these import each other in a circle: {sorted(below)}"
        below = {leaf: needs for leaf, needs in below.items() if leaf not in free}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=ids)
def test_files_stay_small_and_are_named_for_what_they_hold(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; more than {MAX_LINES} are two ideas"
    assert path.stem not in ("utils", "util", "helpers", "misc")


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "trainer" / "moe" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch, trainer.run\nfrom . import a\nfrom .b import c\nfrom ..run import Run\nfrom .. import cli\n"
        "def f():\n    from data_prep.errors import UserError\n"
    )
    assert list(imports_of(path)) == [
        "trainer.run",
        "trainer.moe.a",
        "trainer.moe.b.c",
        "trainer.run.folder.Run",
        "trainer.cli.app",
        "data_prep.errors.UserError",
    ]
