"""The audit by edits in memory: what it shows, that every byte comes back, and that no edited weight is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

from trainer.cli.app import main
from trainer.moe import rank_one
from trainer.moe.backbone import Backbone
from trainer.pipeline import robustness
from trainer.pipeline.experiment import Experiment

Small = Callable[..., Path]


def ended(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of RASA, cut down to seconds."""
    organism, root = (request.getfixturevalue(name) for name in ("organism", "root"))
    import tests.organism as made

    folder = tmp_path_factory.mktemp("finished")
    small = made.small.__wrapped__(organism, root, folder)  # type: ignore[attr-defined]
    assert ended("run", small()) == 0
    return folder / "runs" / "small"


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what wrote weights; every writer that torch, safetensors and transformers have is watched."""
    wrote: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            wrote.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    from trainer.runtime import files

    for owner, name in (
        (safetensors.torch, "save_file"),
        (safetensors.torch, "save"),
        (torch, "save"),
        (PreTrainedModel, "save_pretrained"),
        (files, "save_tensors"),
        (files, "write_tensors"),
    ):
        watch(owner, name)
    return wrote


def test_curves_of_base_and_repaired_model_by_kind_of_unit(
    finished: Path, watched: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    before = hashes(finished)
    assert ended("audit", finished, "--prompts", "8") == 0
    rows = json.loads((finished / "robustness.json").read_text())
    for model in ("base", "repaired"):
        own = [row for row in rows if row["model"] == model]
        kinds = [tuple(row["kinds"]) for row in own]
        assert set(kinds) == {(), ("experts",), ("mixer",), ("experts", "mixer")}
        nothing = own[kinds.index(())]
        assert nothing["parameters"] == nothing["relative_change"] == 0
        assert nothing["harmful_refusal"]["rate"] == nothing["benign_compliance"]["rate"] == 1
        experts = [row for row in own if row["kinds"] == ["experts"]]
        assert [row["experts"] for row in experts] == [8, 16, 32, 64]
        shares = [row["parameters"] for row in experts]
        assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
        joint = [row for row in own if len(row["kinds"]) > 1]
        assert min(row["harmful_refusal"]["rate"] for row in joint) < 1, "all writers together move refusals"
    after = hashes(finished)
    assert after.keys() - before.keys() == {"robustness.json", "robustness.png"}
    assert {name for name in before if after[name] != before[name]} == {"report.html"}
    assert 'id="robustness"' in (finished / "report.html").read_text(), "the curves are in the report"
    assert watched == []
    assert "directional ablation in memory" in capfd.readouterr().out


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", ["first edit", "a later edit", "a reply", "the judge", "the figures", "the file"])
def test_broken_into_anywhere_the_bytes_come_back_and_nothing_is_written(
    at: str, finished: Path, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Backbone, dict[str, torch.Tensor]]] = []
    made = Experiment.of.__func__  # type: ignore[attr-defined]

    def keep(cls: Any, *args: Any, **kwargs: Any) -> Any:
        experiment = made(cls, *args, **kwargs)
        state = {name: tensor.clone() for name, tensor in experiment.model.state_dict().items()}
        held.append((experiment.backbone, state))
        return experiment

    def break_in(owner: Any, name: str, call: int) -> None:
        original, calls = getattr(owner, name), iter(range(10_000))

        def called(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise Broken
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    monkeypatch.setattr(Experiment, "of", classmethod(keep))
    point = {
        "first edit": (rank_one, "_scaled_along", 3),
        "a later edit": (rank_one, "_scaled_along", 150),
        "a reply": (Experiment, "ask", 5),
        "the judge": (robustness.metrics, "refusal", 2),
        "the figures": (robustness, "_show", 0),
        "the file": (robustness, "save_robustness", 0),
    }[at]
    break_in(*point)
    before = hashes(finished)
    with pytest.raises(Broken):
        main(["audit", str(finished), "--prompts", "4"])
    assert held
    for backbone, state in held:
        assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())
    changed = {name for name, value in hashes(finished).items() if before.get(name) != value}
    assert changed <= {"robustness.json", "robustness.png"} and watched == []


def test_a_run_that_exported_nothing_is_refused_by_name(small: Small, tmp_path: Path, capfd: Any) -> None:
    assert ended("run", small(), "export.model=false") == 0
    assert ended("audit", tmp_path / "runs" / "small") == 2
    assert "this run holds no model/" in capfd.readouterr().err
