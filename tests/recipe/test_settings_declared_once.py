"""Every setting is declared once, in its section of the recipe: no room keeps a copy of a key and its default.

Copies drift: a documented default and the one that ran were not the same once. What counts as a copy, in a room that
acts on recipes, is a literal that the key itself would accept under the key's own name (the default of a parameter, a
field of a class, an entry of a named dict, a constant in capitals), or a class all of whose fields are keys of one
section. What a run is about (`run`, `model`, `data`) is left out: words like `name` and `path` are not theirs alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from trainer.methods.table import METHODS, recipe_class
from trainer.recipe.section import TrainerSection

ROOMS = ("training", "detection", "evaluation", "pipeline", "planning", "release")
ROOT = Path(__file__).resolve().parent.parent.parent / "trainer"
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NOT_HOW = ("run", "model", "data")


def sections_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The sections of a recipe or section, at any depth."""
    for name, field in model.model_fields.items():
        if name not in NOT_HOW and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield field.annotation
            yield from sections_of(field.annotation)


SECTIONS = list(dict.fromkeys(section for name in METHODS for section in sections_of(recipe_class(name))))


def accepts(section: type[BaseModel], key: str, value: Any) -> bool:
    """Whether the section has the key, and the key would take the value."""
    if key in section.model_fields:
        try:
            TypeAdapter(section.model_fields[key].annotation).validate_python(value, strict=True)
        except ValidationError:
            return False
        return True
    defaults = section.trainer_defaults if issubclass(section, TrainerSection) else {}
    return key in defaults and type(value) is type(defaults[key])


def settings(tree: ast.Module) -> Iterator[tuple[str, str, ast.expr]]:
    """(where, name, value) of everything that gives a name a value in the ways that a setting could be declared."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given, where = node.args, f"parameter of {getattr(node, 'name', 'a lambda')}"
            last = [*given.posonlyargs, *given.args][::-1]  # defaults are those of the last positional ones
            defaults = [*zip(last, given.defaults[::-1], strict=False)]
            for argument, value in [*defaults, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
                if value is not None:
                    yield where, argument.arg, value
        elif isinstance(node, ast.ClassDef):
            for name, value in fields(node):
                if value is not None:
                    yield f"field of {node.name}", name, value
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield f"entry of a dict in line {node.lineno}", key.value, value
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id.isupper() and value is not None:
                yield "constant", target.id.lower(), value


def fields(node: ast.ClassDef) -> list[tuple[str, ast.expr | None]]:
    """Name and default of the annotated names in a class's body; of `field(default=...)` what it says."""
    found: list[tuple[str, ast.expr | None]] = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            value = item.value
            if isinstance(value, ast.Call):
                value = next((word.value for word in value.keywords if word.arg == "default"), value)
            found.append((item.target.id, value))
    return found


def copies(source: str) -> list[str]:
    """One line for each copy of a setting, with the section that declares it."""
    tree, found = ast.parse(source), []
    for where, name, value in settings(tree):
        try:
            literal = ast.literal_eval(value)
        except ValueError:
            continue
        found += [f"{where}: {name} = {literal!r} ({s.__name__})" for s in SECTIONS if accepts(s, name, literal)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and len(names := {name for name, _ in fields(node)}) > 1:
            whole, listed = [s for s in SECTIONS if names <= s.model_fields.keys()], ", ".join(sorted(names))
            found += [f"class {node.name}: {listed} ({s.__name__})" for s in whole]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_room_keeps_a_copy_of_a_setting(path: Path) -> None:
    found = copies(path.read_text(encoding="utf-8"))
    assert not found, "take the section, or the value without a default: " + "; ".join(found)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("@dataclass\nclass Options:\n    train_gates: bool = False\n    other: int = 3", "train_gates = False"),
        ("@dataclass\nclass Options:\n    retain_weight: float = field(default=1.0)", "retain_weight = 1.0"),
        ("@dataclass\nclass Mix:\n    recombined: float\n    anchors: float", "class Mix: anchors, recombined"),
        ("def run(model, *, wraps_per_benign: int = 2): ...", "wraps_per_benign = 2"),
        ("def run(model, temperature: float = 0.5, seed=0): ...", "temperature = 0.5"),
        ("def rank(table, per_layer_cap: int | None = None): ...", "per_layer_cap = None"),
        ('DEFAULTS = {"learning_rate": 5e-4, "other": 1}', "learning_rate = 0.0005"),
        ('def arguments():\n    own: dict = {"lora_rank": 8}', "lora_rank = 8"),
        ("MAX_LENGTH = 512", "max_length = 512"),
        ('def steer(contrast="safety"): ...', "contrast = 'safety'"),
    ],
)
def test_every_form_of_a_copy_is_found(source: str, names: str) -> None:
    assert names in "; ".join(copies(source))


@pytest.mark.parametrize(
    "source",
    [
        "def run(section: RepairSection, seed: int, batch_size: int): ...",
        "def save(model=None, gate: Gate | None = None): ...",  # keys of these names take true or false
        "@dataclass\nclass Target:\n    goal: Prompt\n    refusal: Reply",
        "@dataclass\nclass Found:\n    pairs: list[Pair] = field(default_factory=list)",
        'changed = section.model_copy(update={"batch_size": 8})',
        "def save(size: str = ExportSection().max_shard_size): ...",
        'PATCH = "patch.safetensors"',
    ],
)
def test_what_only_shares_a_word_with_a_setting_is_no_copy(source: str) -> None:
    assert copies(source) == []


def test_the_sections_of_every_method_are_looked_at() -> None:
    names = {section.__name__ for section in SECTIONS}
    assert {
        "RepairSection",
        "RasaEvaluateSection",
        "SteerSection",
        "SweepSection",
        "PairsSection",
    } <= names
    assert not names & {"RunSection", "ModelSection", "DataConfig", "SourceConfig"}
