"""A method is one folder: tests/methods/shift, and one line in the table, go through every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_prep.organism.build import Organism
from tests.methods.shift import method as shift
from trainer.cli.app import main
from trainer.methods import table

NAME = "model.layers.1.self_attn.o_proj.weight"
Command = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.METHODS, "shift", "tests.methods.shift")


@pytest.fixture
def recipe(small: Callable[..., Path], tmp_path: Path) -> Path:
    """Half of the data that RASA needs, and none of its sections."""
    tree = yaml.safe_load(small().read_text())
    kept = {name: tree[name] for name in ("run", "model")} | {"method": "shift"}
    kept["data"] = {name: tree["data"][name] for name in ("harmful", "jailbreaks", "capability")}
    path = tmp_path / "shift.yaml"
    path.write_text(yaml.safe_dump(kept))
    return path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert isinstance(left.value.code, int)
        return left.value.code, "".join(capfd.readouterr())

    return call


def test_a_method_of_sixty_lines_goes_through_every_command(
    recipe: Path, command: Command, organism: Organism, tmp_path: Path
) -> None:
    code, planned = command("plan", recipe, "--gpus", "1", "--gpu-memory", "80", "--json")
    assert code == 0
    plan: dict[str, Any] = json.loads(planned[planned.index("{") :])
    before = load_file(organism.model / "model.safetensors")
    assert plan["parameters"]["footprint"] == before[NAME].numel(), "the planner counts the footprint"

    code, said = command("run", recipe)
    assert code == 0, said
    run = tmp_path / "runs/small"
    audit = json.loads((run / "audit.json").read_text())
    assert audit["untouched_identical"] is True and audit["tensors_changed"] == 1 and audit["experts_changed"] == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "over_refusal" not in evaluation["after"], "no borderline prompts were given"
    after = load_file(run / "model/model.safetensors")
    assert torch.equal(after[NAME], before[NAME] + 1e-3)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != NAME)

    patch = json.loads((run / "patch.json").read_text())
    assert patch["footprint"] == {NAME: None} and list(patch["tensors"]) == [NAME]
    assert command("apply", organism.model, run, "--out", tmp_path / "applied")[0] == 0
    assert all(torch.equal(t, after[n]) for n, t in load_file(tmp_path / "applied/model.safetensors").items())

    code, said = command("report", run)
    assert code == 0 and "What was shifted" in (run / "report.html").read_text()
    code, said = command("push", run, "--repo", "user/name", "--dry-run")
    assert code == 0 and f"Only {NAME} was moved; every other weight is the base's, bit for bit." in said, said
    assert command("run", recipe)[0] == 0, "and is kept when it is run again"


def test_the_audit_catches_one_tensor_more(
    recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In one line, with exit code 2."""
    edit = shift.Shift.edit

    @torch.no_grad()
    def careless(self: Any, model: torch.nn.Module, given: Any) -> None:
        edit(self, model, given)
        model.get_parameter("model.layers.0.mlp.gate.weight")[0, 0] += 1e-3  # a router, which nothing declares

    monkeypatch.setattr(shift.Shift, "edit", careless)
    code, said = command("run", recipe)
    assert code == 2 and "moved outside the footprint: ['model.layers.0.mlp.gate.weight']" in said
    assert not (tmp_path / "runs/small/patch.json").exists()
    manifest = json.loads((tmp_path / "runs/small/manifest.json").read_text())
    assert manifest["stages"]["export"]["status"] == "started"
