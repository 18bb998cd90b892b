"""What a push uploads, and what is never pushed; against a server that speaks the Hub's API."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from data_prep.errors import UserError
from tests.release.conftest import allowed, change
from tests.release.hub_server import TOKEN, Hub, serving
from tests.reporting.conftest import evaluation, made, rate
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.methods.table import load_recipe, recipe_of, report_of
from trainer.moe.expert_set import ExpertSet
from trainer.pipeline.push import push
from trainer.recipe.sections import ExportSection
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint
from trainer.release.patch import apply_patch, write_patch
from trainer.reporting.method_report import MethodReport
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
    outputs = [
        path for path in run.rglob("*") if path.is_file() and (path.parent.name == "model" or "patch" in path.name)
    ]
    stage = StepRecord(
        status="finished",
        inputs="0",
        started="2026-01-01T00:00:00+00:00",
        outputs={path.relative_to(run).as_posix(): sha256(path) for path in outputs},
    )
    manifest = Manifest(
        name="demo-run",
        created="2026-01-01T00:00:00+00:00",
        recipe_hash=recipe.hash(),
        recipe=recipe.tree(),
        seed=0,
        versions=versions,
        stages={"export": stage},
    )
    (run / "manifest.json").write_text(manifest.model_dump_json())
    return run


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


# --- what is uploaded -----------------------------------------------------------------------------


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
    assert found["evaluation"] == evaluation()


@pytest.mark.parametrize("options", [(), ("--patch-only",)])
def test_no_path_of_this_machine_and_no_token_leaves_it(options: tuple[str, ...], hub: Hub, run: Path) -> None:
    stray = "hf_" + "Ab3" * 10

    def leave_traces(manifest: dict[str, Any]) -> None:
        manifest["versions"] |= {"note": stray, "mine": TOKEN}

    edit(run / "manifest.json", leave_traces)
    push(run, "user/safer", patch_only=bool(options))
    everything = b"".join(content for name, content in hub.files["user/safer"].items())
    for secret in (TOKEN, stray, str(run.parent), "/machine", str(Path.home()) + "/"):
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


# --- what is never pushed -------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def worse(key: str, before: tuple[int, int], after: tuple[int, int]) -> Spoil:
    def spoil(run: Path) -> None:
        def change_rates(tree: dict[str, Any]) -> None:
            tree["before"][key], tree["after"][key] = rate(*before), rate(*after)

        edit(run / "evaluation.json", change_rates)

    return spoil


def without(file: str, key: str) -> Spoil:
    return lambda run: edit(run / file, lambda tree: [tree[when].pop(key) for when in ("before", "after")])


def setting(file: str, key: str, value: object) -> Spoil:
    return lambda run: edit(run / file, lambda tree: tree.update({key: value}))


def open_stage(run: Path) -> None:
    edit(run / "manifest.json", lambda tree: tree["stages"]["export"].update(status="started"))


REFUSED: dict[str, tuple[Spoil, str]] = {
    "more attacks succeed": (worse("asr_unseen", (10, 100), (40, 100)), "less safe than before: asr_unseen"),
    "robust families fall": (worse("asr_robust", (0, 100), (30, 100)), "less safe than before: asr_robust"),
    "fewer refusals": (worse("harmful_refusal", (99, 100), (70, 100)), "less safe than before: harmful_refusal"),
    "refusals not measured": (without("evaluation.json", "harmful_refusal"), "harmful_refusal was not measured"),
    "no evaluation": (lambda run: (run / "evaluation.json").unlink(), "not finished .no evaluation.json"),
    "no audit": (lambda run: (run / "audit.json").unlink(), "not finished .no audit.json"),
    "a stage was interrupted": (open_stage, "stage export is not finished"),
    "moved outside": (setting("audit.json", "untouched_identical", False), "weights outside the footprint moved"),
    "audit of full fine-tuning for a repair": (
        setting("audit.json", "untouched_identical", None),
        "nothing shows that weights outside the footprint stayed",
    ),
    "audit that does not say": (
        lambda run: edit(run / "audit.json", lambda tree: (tree.pop("untouched_identical"), tree.pop("footprint"))),
        "nothing shows that weights outside the footprint stayed",
    ),
    "reads back otherwise": (setting("audit.json", "reload_ok", False), "answers differently"),
    "a changed checkpoint": (
        lambda run: (run / "model/config.json").write_text("{}"),
        "changed since the run's audit",
    ),
    "a missing patch": (lambda run: (run / "patch.json").unlink(), "patch.json: missing"),
    "no run": (lambda run: (run / "manifest.json").unlink(), "not a run folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_whose_evidence_does_not_hold_is_refused_in_one_line_and_nothing_is_sent(
    case: str, hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[case]
    spoil(run)
    with pytest.raises(UserError, match=message):
        push(run, "user/safer")
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(run), "--repo", "user/safer", "--dry-run"])
    assert stopped.value.code == 2
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
    assert hub.requests == []


def test_a_run_without_any_attack_is_refused(run: Path) -> None:
    for key in ("asr_seen", "asr_unseen"):
        without("evaluation.json", key)(run)
    with pytest.raises(UserError, match="asr_unseen was not measured before and after"):
        push(run, "user/safer", dry_run=True)


def test_a_change_within_the_intervals_is_no_reason_to_refuse(run: Path) -> None:
    worse("harmful_refusal", (99, 100), (97, 100))(run)
    assert push(run, "user/safer", dry_run=True) is None


def test_full_fine_tuning_claims_nothing_untouched_and_may_be_pushed(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setting("audit.json", "untouched_identical", None)(run)
    setting("audit.json", "footprint", {"tensors": 90, "parameters": 123_456, "of": 123_456})(run)
    assert push(run, "user/safer", dry_run=True) is None
    assert "All of its weights were trained." in capfd.readouterr().out


def test_a_run_that_kept_only_one_form_is_pushed_in_that_form(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def keep(left_out: str) -> None:
        outputs = Manifest.read(run).stages["export"].outputs
        kept = {name: digest for name, digest in outputs.items() if not name.startswith(left_out)}
        edit(run / "manifest.json", lambda tree: tree["stages"]["export"].update(outputs=kept))

    keep("patch")
    for name in ("patch.safetensors", "patch.json"):
        (run / name).rename(run / f"kept-{name}")
    with pytest.raises(UserError, match="holds no patch"):
        push(run, "user/safer", patch_only=True)
    out = printed(run, "--dry-run", capfd=capfd)
    assert "config.json" in out and "routealign apply" not in out
    for name in ("patch.safetensors", "patch.json"):
        (run / f"kept-{name}").rename(run / name)
    keep("model")
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match=r"holds no model/; export it, or use --patch-only"):
        push(run, "user/safer")
    out = printed(run, "--dry-run", "--patch-only", capfd=capfd)
    assert "routealign apply" in out and "from_pretrained" not in out


@pytest.mark.parametrize("name", ["safer", "user/", "a/b/c", "../x", "user/sa fer", "https://x/y"])
def test_a_name_that_is_no_repository_is_refused(name: str, finished: Path) -> None:
    with pytest.raises(UserError, match="allowed: user/name"):
        push(finished, name, dry_run=True)


# --- the Hub refuses ------------------------------------------------------------------------------


def test_what_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str, **options: bool) -> str:
        with pytest.raises(UserError) as error:
            push(finished, repo, **options)
        line = str(error.value)
        assert "\n" not in line and TOKEN not in line
        return line

    assert "may not write there" in refused("somebody/safer")
    hub.broken_uploads = True
    assert "may not write there" in refused("user/safer")
    assert hub.files["user/safer"] == {}
    hub.broken_uploads = False
    hub.private["user/safer"] = False
    assert "exists and is public" in refused("user/safer", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    assert "does not know you" in refused("user/safer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in refused("user/safer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused("user/safer")
