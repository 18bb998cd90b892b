"""Imports run one way, down the floors of docs/architecture.md, and files stay small."""

import ast
import re
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
    {"pipeline"},
    {"training", "detection", "planning", "release"},
    {"evaluation"},
    {"engines", "reporting", "run"},
    {"model"},
    {"recipe"},
    {"runtime"},
    {"moe"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
METHODS = re.compile(r"(?<![a-z])(rasa|steermoe)(?![a-z])", re.IGNORECASE)

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
            assert known in FLOOR, f"trainer/{known} has no floor yet: say which, here and in the docs"
        if room == here:
            if here == "methods" and len(inside) > 2:
                assert name.split(".")[2] in (inside[1], "method", "table"), f"a method never imports another: {name}"
        else:
            assert FLOOR[here] < FLOOR[room], f"{here} is not above {room}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_the_pipeline_touches_the_run_folder(path: Path) -> None:
    room = module_of(path).split(".")[1:2]
    if module_of(path).startswith("trainer.") and room not in (["pipeline"], ["run"]):
        assert not [name for name in imports_of(path) if name.startswith("trainer.run.")]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_methods_and_recipes_name_a_method(path: Path) -> None:
    """In code: a docstring or a comment may say what something is for."""
    package, *inside = module_of(path).split(".")
    if package == "data_prep" or inside[:1] in (["methods"], ["recipe"]):
        return
    named = [word for word in words_of_code(path) if METHODS.search(word)]
    assert not named, f"names a method: {named}"


def words_of_code(path: Path) -> Iterator[str]:
    """Every name and every text of a file's code, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


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
        "trainer.run.Run",
        "trainer.cli",
        "data_prep.errors.UserError",
    ]
