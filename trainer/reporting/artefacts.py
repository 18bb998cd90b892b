"""Reading a run folder. Only `evaluation.json` is needed; whatever else is absent is remembered as absent."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from data_prep.errors import UserError
from data_prep.json_lines import read_json_lines


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
    """Read a run folder. `UserError` where `evaluation.json` is absent, or any file present cannot be read."""
    evaluation_path = run_dir / "evaluation.json"
    if not evaluation_path.is_file():
        raise UserError(f"{evaluation_path} not found: a report needs the evaluation; finish the run first")
    evaluation = _json(evaluation_path)
    absent = [key for key in ("before", "after") if not isinstance(evaluation, dict) or key not in evaluation]
    if absent:
        raise UserError(f"{evaluation_path}: key '{absent[0]}' not found; expected 'before', 'after', 'diagnostics'")
    found = Artefacts(run_dir, evaluation)
    recipe_path, activations_path = run_dir / "recipe.yaml", run_dir / "activations.parquet"
    if _present(found, recipe_path):
        found.recipe_text = recipe_path.read_text(encoding="utf-8")
        found.recipe = _yaml(recipe_path, found.recipe_text)
    if _present(found, run_dir / "manifest.json"):
        found.manifest = _object(run_dir / "manifest.json")
    if _present(found, run_dir / "pairs.jsonl"):
        found.pairs = [row for _, row in read_json_lines(run_dir / "pairs.jsonl")]
    if _present(found, activations_path):
        found.activations = pd.read_parquet(activations_path)
    if _present(found, run_dir / "expert_set.json"):
        found.expert_set = _object(run_dir / "expert_set.json")
    if _present(found, run_dir / "audit.json"):
        found.audit = _object(run_dir / "audit.json")
    stages = sorted(run_dir.glob("stages/*/"), key=lambda path: _stage_order(path.name))
    found.logs = {path.name: _log(path / "log.json") for path in stages if (path / "log.json").is_file()}
    sized = [path for path in stages if (path / "parameters.json").is_file()]
    found.parameters = {path.name: _object(path / "parameters.json") for path in sized}
    found.rows = {path.name: _object(path / "rows.json") for path in stages if (path / "rows.json").is_file()}
    if not found.logs:
        found.missing.add("stages/*/log.json")
    return found


def _present(found: Artefacts, path: Path) -> bool:
    if not path.is_file():
        found.missing.add(path.name)
    return path.is_file()


def _stage_order(name: str) -> tuple[int, str]:
    number = name.split("-", 1)[0]
    return (int(number) if number.isdigit() else 10**6, name)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    value = _json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _log(path: Path) -> list[dict[str, Any]]:
    value = _json(path)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path}: expected a list of objects, as in the trainer's log_history")
    return value


def _yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return value if isinstance(value, dict) else {}
