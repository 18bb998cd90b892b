"""Expert sets and steering files that cannot be are refused in one line with file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.steering_file import SteeringFile

SIZES = {0: 8, 1: 8}
STEERING: dict[str, Any] = {
    "format": "routealign-steering-1",
    "model": "m",
    "revision": None,
    "model_type": "olmoe",
    "experts_per_layer": {"0": 8, "1": 8},
    "top_k": {"0": 2, "1": 2},
    "routers_sha256": "0" * 64,
    "activate": [[0, 3]],
    "deactivate": [[1, 2]],
    "strength": 1.0,
    "eps": 0.01,
    "per_layer_cap": None,
    "gate": {"layer": 1, "weight_D": [0.5, 1], "bias": 0, "about": {}},
    "about": {},
}
INF, NAN = float("inf"), float("nan")


def refused(path: Path, load: Callable[[Path], object]) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["version"], 2, "version: found 2, expected 1"),
        (["members"], [3], "members.0: found 3"),
        (["members"], None, "members: found null"),
        (["members", 0, "expert"], True, "members.0.expert: found true"),
        (["members", 0, "expert"], 1.0, "members.0.expert: found 1.0"),
        (["members", 0, "expert"], 99, "expert 99 of layer 0 does not exist"),
        (["members", 0, "layer"], -1, "members.0.layer: found -1"),
        (["members", 0, "score"], NAN, "members.0.score: found NaN"),
        (["members", 0, "stability"], 1.5, "members.0.stability: found 1.5"),
        (["experts_per_layer"], [8, 8], "experts_per_layer: found [8, 8]"),
        (["experts_per_layer", "0"], INF, "experts_per_layer.0: found Infinity"),
        (["experts_per_layer", "x"], 8, "experts_per_layer.x: found"),
        (["shared_experts"], [7], "shared experts of layers [7]"),
        (["model"], 3, "model: found 3"),
        (["about"], "text", "about: found"),
    ],
)
def test_an_expert_set_that_cannot_be(tmp_path: Path, keys: list[Any], value: Any, words: str) -> None:
    tree = json.loads(ExpertSet((Member(0, 1, 0.5, 0.9), Member(1, 2)), SIZES).to_json())
    assert words in refused(changed(tmp_path, tree, keys, value), ExpertSet.load)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["format"], "routealign-steering-9", "format: found"),
        (["activate"], [[0, 3.0]], "activate.0.1: found 3.0"),
        (["activate"], [[0, INF]], "activate.0.1: found Infinity"),
        (["activate"], [[0]], "activate.0.1"),
        (["activate"], {"0": [3]}, "activate: found"),
        (["activate"], [[0, 9]], "expert 9 of layer 0 does not exist"),
        (["activate"], [[1, 2]], "is in both"),
        (["activate"], [[0, 1], [0, 2], [0, 3]], "activates 3 experts"),
        (["top_k"], {"0": 2}, "different layers"),
        (["top_k", "0"], 0, "top_k.0: found 0"),
        (["strength"], 1.1, "strength: found 1.1"),
        (["strength"], NAN, "strength: found NaN"),
        (["strength"], "1", "strength: found"),
        (["eps"], 0, "eps: found 0"),
        (["gate", "weight_D"], [], "gate.weight_D: found []"),
        (["gate", "weight_D"], ["a"], "gate.weight_D.0: found"),
        (["gate", "bias"], INF, "gate.bias: found Infinity"),
        (["gate"], 3, "gate: found 3"),
    ],
)
def test_a_steering_file_that_cannot_be(tmp_path: Path, keys: list[Any], value: Any, words: str) -> None:
    assert words in refused(changed(tmp_path, STEERING, keys, value), SteeringFile.load)


@pytest.mark.parametrize("load", [ExpertSet.load, SteeringFile.load])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"members": ' + b"[" * 100_000, b"{}"])
def test_a_file_that_is_neither(tmp_path: Path, load: Callable[[Path], object], content: bytes) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(content)
    refused(path, load)


def changed(folder: Path, tree: dict[str, Any], keys: list[Any], value: Any) -> Path:
    tree = json.loads(json.dumps(tree))
    at: Any = tree
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path = folder / "file.json"
    path.write_text(json.dumps(tree))
    return path
