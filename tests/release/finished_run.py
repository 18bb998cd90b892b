"""Fixtures of a finished run to be pushed, a Hub to push it to, and what makes the run another one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.release.conftest import allowed, change
from tests.release.hub_server import TOKEN, Hub, serving
from tests.reporting.conftest import evaluation, made
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.methods.table import load_recipe, recipe_of
from trainer.moe.expert_set import ExpertSet
from trainer.pipeline.publish import MOVED
from trainer.recipe.sections import ExportSection
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint
from trainer.release.patch import write_patch
from trainer.run.manifest import Manifest, StepRecord
from trainer.runtime.files import sha256


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A finished run of a tiny model, with real checkpoint, patch and audit, and the figures of a good repair."""
    folder = tmp_path_factory.mktemp("machine")
    model = tiny_model()
    save_checkpoint(model, tiny_tokenizer(), folder / "tiny-base", ExportSection(max_shard_size="60KB"))
    (folder / "tiny-base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    run = made(folder / "runs/demo-run")
    experts = change(model, [(0, 1), (2, 7)])
    save_checkpoint(model, tiny_tokenizer(), run / "model", ExportSection(max_shard_size="60KB"))
    tree = load_recipe(root / "recipes/organism/rasa.yaml").tree()
    tree["model"]["name_or_path"] = str(folder / "tiny-base")
    tree["run"]["output_dir"] = str(folder / "runs")
    for source in ("harmful", "benign", "borderline", "jailbreaks"):
        tree["data"][source]["path"] = str(folder / f"data/{source}.jsonl")
    recipe = recipe_of(tree, source="test")
    (run / "recipe.yaml").write_text(recipe.resolved_yaml())
    (run / "expert_set.json").write_text(ExpertSet(experts.members, experts.experts_per_layer, "x").to_json())
    footprint = allowed(model, experts)
    audit = audit_files(folder / "tiny-base", run / "model", footprint)
    audit |= {"reload_max_logit_difference": 0.0, "reload_ok": True}
    (run / "audit.json").write_text(json.dumps(audit))
    versions = {"routealign": "0.1", "torch": "2.13.0"}
    write_patch(
        folder / "tiny-base",
        run / "model",
        run,
        base_name=str(folder / "tiny-base"),
        revision=None,
        footprint=footprint,
        expert_set=experts,
        recipe_hash=recipe.hash(),
        versions=versions,
    )
    for stage in ("evaluate-before", "evaluate-after", "diagnose", "control"):
        (run / "stages" / stage).mkdir()
    shown = evaluation() | {"version": 1, "changes": {}}
    shown["diagnostics"] |= {key: audit[key] for key in MOVED}
    (run / "evaluation.json").write_text(json.dumps(shown))
    manifest = Manifest(
        name="demo-run",
        created="2026-01-01T00:00:00+00:00",
        recipe_hash=recipe.hash(),
        recipe=recipe.tree(),
        seed=recipe.run.seed,
        versions=versions,
    )
    (run / "manifest.json").write_text(manifest.model_dump_json())
    record(run)
    return run


STEPS = {
    "detect": ([], ["pairs.jsonl", "activations.parquet", "expert_set.json"]),
    "evaluate-before": ([], ["stages/evaluate-before/metrics.json"]),
    "repair-1": (["detect"], ["stages/1-repair-1/log.json", "stages/1-repair-1/parameters.json"]),
    "evaluate-after": (["repair-1"], ["stages/evaluate-after/metrics.json"]),
    "diagnose": (["repair-1", "evaluate-after"], ["stages/diagnose/diagnostics.json"]),
    "control": (["repair-1"], ["stages/control/metrics.json"]),
    "export": (["repair-1"], ["audit.json", "patch.json", "patch.safetensors", "model/*"]),
}
"""Step -> (the steps before it, what it wrote)."""


def record(run: Path) -> None:
    """Make the folder that of a run which found what `evaluation.json` says and wrote the files that are there."""
    shown = json.loads((run / "evaluation.json").read_text())
    for side in ("before", "after"):
        (run / f"stages/evaluate-{side}/metrics.json").write_text(json.dumps(shown[side]))
    (run / "stages/diagnose/diagnostics.json").write_text(json.dumps(shown["diagnostics"]))
    (run / "stages/control/metrics.json").write_text(json.dumps(shown["diagnostics"]["random_control"]))
    stages: dict[str, StepRecord] = {}
    for name, (before, patterns) in STEPS.items():
        paths = [path for pattern in patterns for path in sorted(run.glob(pattern))]
        stages[name] = StepRecord(
            status="finished",
            inputs="0",
            started="2026-01-01T00:00:00+00:00",
            after={step: stages[step].digest for step in before},
            outputs={path.relative_to(run).as_posix(): sha256(path) for path in paths},
        )
    manifest = Manifest.read(run).model_copy(update={"stages": stages})
    (run / "manifest.json").write_text(manifest.model_dump_json())


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed at will."""
    return shutil.copytree(finished, tmp_path / "demo-run")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running server, and huggingface_hub set up to use it."""
    with serving(Hub()) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def printed(run: Path, *options: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(run), "--repo", "user/safer", *options])
    assert stopped.value.code == 0
    return capfd.readouterr().out


def edit(path: Path, change_tree: Callable[[Any], object]) -> None:
    tree = json.loads(path.read_text())
    change_tree(tree)
    path.write_text(json.dumps(tree))
