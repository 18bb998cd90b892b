"""Reading a run folder. Only `evaluation.json` is needed; whatever else is absent is remembered as absent."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel

from data_prep.errors import UserError
from data_prep.json_lines import read_json_lines
from trainer.moe.json_files import parse
from trainer.recipe.yaml import read_yaml
from trainer.reporting import records
from trainer.reporting.records import FINITE

COUNTS = ("a1", "d1", "a2", "d2")
"""Columns of a table of activations that are not shown, but are in every table that detection wrote."""
COLUMNS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("layer", "expert"), (0, 65535)),
    "score": (-FINITE, FINITE),
    **dict.fromkeys(COUNTS, (0, 2**53)),
}
"""Column -> its smallest and largest value."""


@dataclass
class Artefacts:
    """What a run folder holds (formats: see `html`). None or empty where `missing` names the file."""

    folder: Path
    evaluation: dict[str, Any]
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    activations: pd.DataFrame | None = None
    expert_set: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    robustness: list[dict[str, Any]] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)

    @property
    def before(self) -> dict[str, Any]:
        """M before the repair."""
        return self.evaluation["before"]

    @property
    def after(self) -> dict[str, Any]:
        """M after the repair."""
        return self.evaluation["after"]

    @property
    def diagnostics(self) -> dict[str, Any]:
        """D, possibly empty."""
        return self.evaluation.get("diagnostics") or {}


def read(run_dir: Path) -> Artefacts:
    """Read a run folder.

    Raises:
        UserError: `evaluation.json` is absent, or a file that is present cannot be read, or holds something else than
            it should; names the file and the key.
    """
    evaluation_path = run_dir / "evaluation.json"
    if not evaluation_path.is_file():
        raise UserError(f"{evaluation_path} not found: a report needs the evaluation; finish the run first")
    found = Artefacts(run_dir, _object(evaluation_path, records.Evaluation))
    recipe_path, activations_path = run_dir / "recipe.yaml", run_dir / "activations.parquet"
    if _present(found, recipe_path):
        found.recipe = _recipe(recipe_path)
        found.recipe_text = recipe_path.read_text(encoding="utf-8")
    if _present(found, run_dir / "manifest.json"):
        found.manifest = _object(run_dir / "manifest.json", records.Manifest)
    if _present(found, run_dir / "pairs.jsonl"):
        found.pairs = [row for _, row in read_json_lines(run_dir / "pairs.jsonl")]
    if _present(found, activations_path):
        found.activations = _activations(activations_path)
    if _present(found, run_dir / "expert_set.json"):
        found.expert_set = _object(run_dir / "expert_set.json", records.ExpertSet)
    if _present(found, run_dir / "audit.json"):
        found.audit = _object(run_dir / "audit.json", records.Audit)
    if _has(run_dir, "robustness.json"):
        found.robustness = _checked(run_dir / "robustness.json", records.Robustness)
    stages = sorted(run_dir.glob("stages/*/"), key=lambda path: _stage_order(path.name))
    found.logs = {path.name: _checked(path / "log.json", records.Log) for path in stages if _has(path, "log.json")}
    sized = [path for path in stages if _has(path, "parameters.json")]
    found.parameters = {path.name: _object(path / "parameters.json", records.Parameters) for path in sized}
    found.rows = {path.name: _checked(path / "rows.json", records.Rows) for path in stages if _has(path, "rows.json")}
    if not found.logs:
        found.missing.add("stages/*/log.json")
    return found


def _present(found: Artefacts, path: Path) -> bool:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the file that a run writes there")
    if not path.is_file():
        found.missing.add(path.name)
    return path.is_file()


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _stage_order(name: str) -> tuple[int, str]:
    number = name.split("-", 1)[0]
    return (int(number) if number.isdecimal() and len(number) < 7 else 10**6, name)


def _checked(path: Path, kind: type[BaseModel]) -> Any:
    """The file's content as plain values, once it is known to be of `kind`."""
    try:
        parse(path, kind, "what a run writes there")
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(str(error)) from error


def _object(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = _checked(path, kind)
    return found


def _recipe(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    model = tree.get("model")
    if model is not None and not (isinstance(model, dict) and isinstance(model.get("name_or_path", ""), str)):
        raise UserError(f"{path}: model: found {model!r}, expected a mapping with the text name_or_path")
    return tree


def _activations(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
    for column, (least, most) in COLUMNS.items():
        if column not in frame:
            if column in COUNTS:
                continue
            raise UserError(f"{path}: no column {column!r}; found: {', '.join(map(str, frame.columns[:20]))}")
        values = frame[column]
        kind = pd.api.types.is_integer_dtype if most < FINITE else pd.api.types.is_numeric_dtype
        if not kind(values) or pd.api.types.is_bool_dtype(values):
            raise UserError(f"{path}: column {column!r}: found values of type {values.dtype}, expected numbers")
        wrong = values[~values.between(least, most)]
        if len(wrong):
            allowed = f"{least} to {most}" if most < FINITE else "a finite number"
            raise UserError(
                f"{path}: column {column!r}, row {wrong.index[0]}: found {wrong.iloc[0]}; allowed: {allowed}"
            )
    if frame.duplicated(["layer", "expert"]).any():
        raise UserError(f"{path}: an expert has two rows; expected one for each layer and expert")
    return frame
