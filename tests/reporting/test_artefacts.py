"""Files of a run folder are read with their types and bounds: what is wrong is named by file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from trainer.reporting.artefacts import read
from trainer.reporting.compare import comparison


def put(path: Path, keys: list[Any], value: Any) -> None:
    tree = json.loads(path.read_text())
    at = tree
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"),
    [
        ("evaluation.json", ["before"], None, "before: found null"),
        ("evaluation.json", ["after", "asr_seen", "rate"], "0.1", "after: asr_seen.rate: found"),
        ("evaluation.json", ["after", "asr_seen", "rate"], 1.5, "after: asr_seen.rate: found 1.5"),
        ("evaluation.json", ["after", "asr_seen", "rate"], float("nan"), "after: asr_seen.rate: found NaN"),
        ("evaluation.json", ["after", "asr_seen", "n"], 0, "after: asr_seen.n: found 0"),
        ("evaluation.json", ["after", "asr_seen", "ci95"], [0.1], "after: asr_seen.ci95: found"),
        ("evaluation.json", ["diagnostics"], [], "diagnostics: found []"),
        ("evaluation.json", ["diagnostics", "experts_changed"], True, "diagnostics.experts_changed: found true"),
        ("evaluation.json", ["diagnostics", "drift_per_layer"], [3], "diagnostics.drift_per_layer.0: found 3"),
        ("manifest.json", ["stages"], [], "stages: found []"),
        ("manifest.json", ["versions"], {"a": 1}, "versions.a: found 1"),
        ("expert_set.json", ["members"], [1, 2], "members.0: found 1"),
        ("expert_set.json", ["members", 0, "layer"], -1, "members.0.layer: found -1"),
        ("expert_set.json", ["members", 0, "expert"], True, "members.0.expert: found true"),
        ("expert_set.json", ["members", 0, "stability"], 2, "members.0.stability: found 2"),
        ("stages/1-repair-1/log.json", [0, "loss"], "low", "0.loss"),
        ("stages/1-repair-1/log.json", [1, "loss"], float("inf"), "1: loss: found inf, expected a finite number"),
        ("stages/1-repair-1/log.json", [1, "retain_loss"], float("nan"), "1: retain_loss: found nan"),
        ("stages/1-repair-1/log.json", [0, "step"], 10**400, "0: step: found 1000"),
        ("stages/1-repair-1/parameters.json", ["total_parameters"], 0, "total_parameters: found 0"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(
    run_dir: Path, name: str, keys: list[Any], value: Any, words: str
) -> None:
    path = run_dir / name
    if not path.exists():
        path.write_text('{"trained_parameters": 1, "total_parameters": 2}')
    put(path, keys, value)
    for attempt in (lambda: read(run_dir), lambda: comparison([run_dir])):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["evaluation.json", "manifest.json", "expert_set.json", "audit.json", "stages/1-repair-1/log.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"null", b"3", b"[" * 100_000, b'{"a": 1e999}'])
def test_a_file_that_is_no_json_of_ours_is_named(run_dir: Path, name: str, content: bytes) -> None:
    (run_dir / name).write_bytes(content)
    try:
        read(run_dir)
    except UserError as error:
        assert str(run_dir / name) in str(error) and "\n" not in str(error)
    else:
        assert content == b'{"a": 1e999}' and name in ("manifest.json", "expert_set.json", "audit.json")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda frame: frame.assign(score="high"), "column 'score': found values of type"),
        (lambda frame: frame.assign(expert=-1), "column 'expert', row 0: found -1"),
        (lambda frame: frame.assign(layer=0.5), "column 'layer': found values of type float64"),
        (lambda frame: frame.assign(score=float("inf")), "column 'score', row 0: found inf"),
        (lambda frame: frame.assign(score=True), "column 'score': found values of type bool"),
        (lambda frame: frame.assign(a1=-frame.a1), "column 'a1', row 0: found -5"),
        (lambda frame: frame.assign(d2="x"), "column 'd2': found values of type"),
        (lambda frame: frame.drop(columns="expert"), "no column 'expert'"),
        (lambda frame: pd.concat([frame, frame]), "two rows"),
    ],
)
def test_activations_that_cannot_be_are_refused_by_column(
    run_dir: Path, spoil: Callable[[pd.DataFrame], pd.DataFrame], words: str
) -> None:
    path = run_dir / "activations.parquet"
    spoil(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(UserError) as caught:
        read(run_dir)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_activations_that_are_no_parquet_and_a_recipe_without_sections_are_refused(run_dir: Path) -> None:
    whole = (run_dir / "activations.parquet").read_bytes()
    (run_dir / "activations.parquet").write_bytes(b"layer,expert\n")
    with pytest.raises(UserError, match=r"activations\.parquet: cannot be read as Parquet"):
        read(run_dir)
    (run_dir / "activations.parquet").write_bytes(whole)
    (run_dir / "recipe.yaml").write_text("model: olmoe\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: model: found 'olmoe'"):
        read(run_dir)


@pytest.mark.parametrize("name", ["recipe.yaml", "pairs.jsonl", "activations.parquet", "audit.json"])
def test_a_folder_in_the_place_of_an_artefact_is_not_taken_for_its_absence(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: is a folder, expected the file that a run writes there"):
        read(run_dir)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PLACES = [
    ("evaluation.json", ["after"]),
    ("evaluation.json", ["after", "asr_seen"]),
    ("evaluation.json", ["after", "asr_seen", "ci95"]),
    ("evaluation.json", ["diagnostics", "random_control"]),
    ("evaluation.json", ["changes"]),
    ("manifest.json", ["stages"]),
    ("manifest.json", ["name"]),
    ("expert_set.json", ["members"]),
    ("audit.json", ["footprint"]),
    ("stages/1-repair-1/log.json", [0]),
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=VALUE)
def test_any_value_in_any_file_is_read_or_refused_in_one_line(
    run_dir: Path, place: tuple[str, list[Any]], value: Any
) -> None:
    path = run_dir / place[0]
    former = path.read_text()
    put(path, place[1], value)
    try:
        read(run_dir)
        comparison([run_dir])
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    finally:
        path.write_text(former)
