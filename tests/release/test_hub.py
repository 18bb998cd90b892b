"""What a push uploads; against a server that speaks the Hub's API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.release.finished_run import edit, finished, hub, printed, run
from tests.release.hub_server import TOKEN, Hub, serving
from tests.reporting.conftest import evaluation
from trainer.methods.table import report_of
from trainer.pipeline.push import push
from trainer.recipe.schema import tree_hash
from trainer.recipe.yaml import dump_yaml
from trainer.release.patch import apply_patch
from trainer.reporting.method_report import MethodReport

__all__ = ["finished", "hub", "run"]


def test_the_command_uploads_checkpoint_patch_card_and_reproduction(finished: Path, tmp_path: Path) -> None:
    with serving(Hub()) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, "-m", "trainer", "push", str(finished), "--repo", "user/safer"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.address}/user/safer/commit/" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
    files = hub.files["user/safer"]
    stored = {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    stored |= {name: (finished / name).read_bytes() for name in ("patch.safetensors", "patch.json")}
    assert files.items() >= stored.items()
    assert files.keys() - stored.keys() == {"README.md", "reproduction.json"}
    assert hub.private == {"user/safer": False}


def test_the_uploaded_patch_makes_the_checkpoint_from_the_base(hub: Hub, finished: Path, tmp_path: Path) -> None:
    push(finished, "user/safer", patch_only=True)
    files = hub.files["user/safer"]
    assert files.keys() == {"patch.safetensors", "patch.json", "README.md", "reproduction.json"}
    (tmp_path / "patch").mkdir()
    for name, content in files.items():
        (tmp_path / "patch" / name).write_bytes(content)
    base = finished.parent.parent / "tiny-base"
    out = apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    for path in (finished / "model").glob("*.safetensors*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_second_push_goes_to_the_same_repository(hub: Hub, run: Path) -> None:
    push(run, "user/safer", patch_only=True)
    push(run, "user/safer")
    assert "config.json" in hub.files["user/safer"]


def test_the_card_tells_what_was_repaired_with_figures_limits_and_licence(hub: Hub, finished: Path) -> None:
    push(finished, "user/safer", private=True)
    assert hub.private == {"user/safer": True}
    card = ModelCard(hub.files["user/safer"]["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    results = {result.metric_type: result for result in card.data.eval_results}
    after = evaluation()["after"]
    for key in ("asr_seen", "asr_unseen", "harmful_refusal", "over_refusal", "degenerate"):
        assert results[key].metric_value == round(after[key]["rate"], 4)
        assert results[key].metric_args["n"] == after[key]["n"]
    assert results["asr_seen"].dataset_name == "harmful.jsonl"
    assert "| Attack success, seen families | 99.0\u00a0% [96.4, 99.7] | 1.5\u00a0% [0.5, 4.3] |" in card.content
    assert "Degenerate replies rose" in card.content  # a caution of the report
    assert "| moved\\_outside | none |" in card.content
    assert "layer 0: 1; layer 2: 7." in card.content
    assert "NEVER SHOWN" not in card.content and "<script>" not in card.content
    assert "every other weight is the base's, bit for bit" in card.content


def test_the_card_says_what_was_edited_in_the_methods_words_or_by_the_audits_count(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((finished / "audit.json").read_text())["footprint"]
    counted = f"Only {found['parameters']:,} of its {found['of']:,} parameters were open to change"
    for edited in ("Only the experts named below and the routers were trained.", None):
        push(finished, "user/safer", dry_run=True, report=lambda _, edited=edited: MethodReport(edited=edited))
        card = capfd.readouterr().out
        said = edited.removesuffix(".") if edited else counted
        assert f"{said}; every other weight is the base's, bit for bit." in card


def test_reproduction_holds_recipe_versions_hashes_and_seed(hub: Hub, finished: Path) -> None:
    push(finished, "user/safer", patch_only=True)
    found = json.loads(hub.files["user/safer"]["reproduction.json"])
    manifest = json.loads((finished / "manifest.json").read_text())
    for key in ("recipe_hash", "seed", "versions"):
        assert found[key] == manifest[key]
    assert found["stages"]["export"]["outputs"] == manifest["stages"]["export"]["outputs"]
    assert found["recipe"]["model"]["name_or_path"] == "tiny-base"
    assert found["recipe"]["data"]["harmful"]["path"] == "harmful.jsonl"
    assert found["evaluation"] == json.loads((finished / "evaluation.json").read_text())


@pytest.mark.parametrize("options", [(), ("--patch-only",)])
def test_no_path_of_this_machine_and_no_token_leaves_it(options: tuple[str, ...], hub: Hub, run: Path) -> None:
    stray, other, named = "hf_" + "Ab3" * 10, "ghp_" + "Ab3" * 12, "correct horse"

    def leave_traces(manifest: dict[str, Any]) -> None:
        manifest["versions"] |= {"note": stray, "mine": TOKEN, "other": other}
        recipe = manifest["recipe"]
        recipe["repair"]["trainer_note"] = {"wandb_api_key": named}
        recipe["data"]["harmful"]["path"] = f"https://me:{named.replace(' ', '')}@host/harmful.jsonl?token={named[:7]}"
        manifest["recipe_hash"] = tree_hash(recipe)
        (run / "recipe.yaml").write_text(dump_yaml(recipe))

    edit(run / "manifest.json", leave_traces)
    push(run, "user/safer", patch_only=bool(options))
    everything = b"".join(content for name, content in hub.files["user/safer"].items())
    for secret in (
        TOKEN,
        stray,
        other,
        named,
        named.replace(" ", ""),
        named[:7],
        str(run.parent),
        "/machine",
        str(Path.home()) + "/",
    ):
        assert secret.encode() not in everything


def test_a_dry_run_prints_every_file_and_the_card_and_sends_nothing(
    hub: Hub, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = printed(finished, "--dry-run", capfd=capfd)
    assert hub.requests == []
    push(finished, "user/safer", report=report_of("rasa"))
    for name, content in hub.files["user/safer"].items():
        line = next(line for line in out.splitlines() if f" {name} " in line)
        assert f"{len(content):,}" in line
    assert hub.files["user/safer"]["README.md"].decode().strip() in out
