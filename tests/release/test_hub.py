"""What a push uploads, and what is never pushed; against a server that speaks the Hub's API."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from data_prep.errors import UserError
from tests.release.conftest import allowed, change
from tests.release.hub_server import TOKEN, Hub, Spoiled, serving
from tests.reporting.conftest import evaluation, made, rate
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.methods.table import load_recipe, recipe_of, report_of
from trainer.moe.expert_set import ExpertSet
from trainer.pipeline import push as pushing
from trainer.pipeline.publish import MOVED
from trainer.pipeline.push import push
from trainer.recipe.schema import tree_hash
from trainer.recipe.sections import ExportSection
from trainer.recipe.yaml import dump_yaml
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint
from trainer.release.hub import licence_of
from trainer.release.patch import apply_patch, write_patch
from trainer.reporting.method_report import MethodReport
from trainer.run.manifest import Manifest, StepRecord
from trainer.runtime import hub_client
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


# --- what is never pushed -------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def worse(key: str, before: tuple[int, int], after: tuple[int, int]) -> Spoil:
    def spoil(run: Path) -> None:
        def change_rates(tree: dict[str, Any]) -> None:
            tree["before"][key], tree["after"][key] = rate(*before), rate(*after)

        edit(run / "evaluation.json", change_rates)
        record(run)

    return spoil


def without(key: str) -> Spoil:
    return found("evaluation.json", lambda tree: [tree[when].pop(key) for when in ("before", "after")])


def setting(file: str, key: str, value: object) -> Spoil:
    return found(file, lambda tree: tree.update({key: value}))


def found(file: str, change_tree: Callable[[Any], object]) -> Spoil:
    """As if the run had found it, not as if it had been edited later."""

    def spoil(run: Path) -> None:
        edit(run / file, change_tree)
        record(run)

    return spoil


def forged(change_tree: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda run: edit(run / "evaluation.json", change_tree)


def manifest(*path: str, to: object) -> Spoil:
    def change(tree: Any) -> None:
        for part in path[:-1]:
            tree = tree[part]
        tree[path[-1]] = to

    return lambda run: edit(run / "manifest.json", change)


def added(name: str, content: str = "x") -> Spoil:
    def spoil(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)

    return spoil


def also_recorded(name: str, content: str = "x") -> Spoil:
    def spoil(run: Path) -> None:
        added(name, content)(run)
        record(run)

    return spoil


def replaced_by_a_link(name: str) -> Spoil:
    def spoil(run: Path) -> None:
        (run / name).rename(run.parent / "elsewhere")
        (run / name).symlink_to(run.parent / "elsewhere")

    return spoil


def open_stage(run: Path) -> None:
    edit(run / "manifest.json", lambda tree: tree["stages"]["export"].update(status="started"))


REFUSED: dict[str, tuple[Spoil, str]] = {
    "more attacks succeed": (worse("asr_unseen", (10, 100), (40, 100)), "less safe than before: asr_unseen"),
    "robust families fall": (worse("asr_robust", (0, 100), (30, 100)), "less safe than before: asr_robust"),
    "fewer refusals": (worse("harmful_refusal", (99, 100), (70, 100)), "less safe than before: harmful_refusal"),
    "refusals not measured": (without("harmful_refusal"), "harmful_refusal was not measured"),
    "no evaluation": (lambda run: (run / "evaluation.json").unlink(), "not finished .no evaluation.json"),
    "no audit": (lambda run: (run / "audit.json").unlink(), "not finished .no audit.json"),
    "a stage was interrupted": (open_stage, "stage export is not finished"),
    "moved outside": (setting("audit.json", "untouched_identical", False), "weights outside the footprint moved"),
    "audit of full fine-tuning for a repair": (
        setting("audit.json", "untouched_identical", None),
        "nothing shows that weights outside the footprint stayed",
    ),
    "audit that does not say": (
        found("audit.json", lambda tree: (tree.pop("untouched_identical"), tree.pop("footprint"))),
        "nothing shows that weights outside the footprint stayed",
    ),
    "reads back otherwise": (setting("audit.json", "reload_ok", False), "answers differently"),
    "a changed checkpoint": (
        lambda run: (run / "model/config.json").write_text("{}"),
        "changed since the run's audit",
    ),
    "a missing patch": (lambda run: (run / "patch.json").unlink(), "patch.json: missing"),
    "a figure made better": (
        forged(lambda tree: tree["after"]["asr_unseen"].update(rate=0.0)),
        "evaluation.json: after: found other figures than the steps",
    ),
    "a figure made worse before": (
        forged(lambda tree: tree["before"]["asr_unseen"].update(n=10**6)),
        "evaluation.json: before: found other figures",
    ),
    "a change made certain": (forged(lambda tree: tree.update(changes={"asr_seen": {}})), "evaluation.json: changes:"),
    "changes left out": (forged(lambda tree: tree.pop("changes")), "evaluation.json: changes:"),
    "a gap made small": (
        forged(lambda tree: tree["diagnostics"].update(router_restore_gap=0.0)),
        "evaluation.json: diagnostics.router_restore_gap: found other",
    ),
    "a control made bad": (
        forged(lambda tree: tree["diagnostics"].update(random_control=tree["before"])),
        "evaluation.json: diagnostics.random_control: found other",
    ),
    "more that no step found": (forged(lambda tree: tree.update(praise=1)), "evaluation.json: praise: found other"),
    "figures of a step, edited": (
        lambda run: edit(run / "stages/evaluate-after/metrics.json", lambda tree: tree.update(asr={})),
        "metrics.json: missing, or changed since its step wrote it",
    ),
    "a caution taken away": (lambda run: (run / "pairs.jsonl").write_text(""), "pairs.jsonl: missing, or changed"),
    "an audit edited": (
        lambda run: edit(run / "audit.json", lambda tree: tree.update(reload_ok=1)),
        "audit.json: missing, or changed since the run's audit",
    ),
    "experts edited": (
        lambda run: edit(run / "expert_set.json", lambda tree: tree.update(members=[])),
        "expert_set.json: missing, or changed",
    ),
    "another recipe in the manifest": (
        manifest("recipe", "detect", "top_k", to=1000),
        "manifest.json: recipe: changed; its hash is not recipe_hash",
    ),
    "another recipe beside the manifest": (
        lambda run: (run / "recipe.yaml").write_text(
            (run / "recipe.yaml").read_text().replace("top_k: 8", "top_k: 9")
        ),
        "recipe.yaml: changed; not the recipe of manifest.json",
    ),
    "another hash of the recipe": (manifest("recipe_hash", to="0" * 64), "recipe: changed; its hash"),
    "another seed": (manifest("seed", to=7), "manifest.json: seed: found 7, allowed: 0"),
    "a step that rests on another": (
        manifest("stages", "export", "after", "repair-1", to="0" * 64),
        "stages.export.after: found other hashes",
    ),
    "a step replaced by a newer one": (
        manifest("stages", "repair-1", "outputs", to={}),
        "stages.export.after: found other hashes",
    ),
    "a step that rests on none": (
        manifest("stages", "evaluate-after", "after", to={"repair-9": "0" * 64}),
        "stages.evaluate-after.after: found other hashes",
    ),
    "no measurement": (
        lambda run: edit(run / "manifest.json", lambda tree: tree["stages"].pop("evaluate-before")),
        "evaluation.json: before: no step of this run measured it",
    ),
    "an output outside the folder": (
        manifest("stages", "export", "outputs", to={"../x": "0" * 64}),
        "'../x'",
    ),
    "an environment file": (added("model/.env", "A=b"), "model/.env: no step of this run wrote it"),
    "a pickle": (added("model/pytorch_model.bin"), "pytorch_model.bin: no step of this run wrote it"),
    "code": (added("model/modeling.py", "import os"), "modeling.py: no step of this run wrote it"),
    "a file further down": (added("model/a/b/c.txt"), "c.txt: no step of this run wrote it"),
    "a link to a file of the system": (
        lambda run: (run / "model/passwd").symlink_to("/etc/passwd"),
        "model/passwd: no step of this run wrote it",
    ),
    "a link to a folder": (lambda run: (run / "model/etc").symlink_to("/etc"), "model/etc: no step of this run wrote"),
    "a file as a link": (replaced_by_a_link("model/config.json"), "config.json: is a link"),
    "the checkpoint as a link": (replaced_by_a_link("model"), "model: is a link"),
    "a hidden file of the base": (also_recorded("model/.env"), r"\.env: a hidden file, which is not pushed"),
    "a pickle of the base": (also_recorded("model/training_args.bin"), "training_args.bin: a pickle"),
    "code of the base that nothing names": (also_recorded("model/x.py"), "x.py: code that no configuration names"),
    "a program of the base": (also_recorded("model/x.so"), "x.so: code that no configuration names"),
    "a key in a file of the base": (
        also_recorded("model/notes.txt", "AKIA" + "A1B2" * 4),
        "notes.txt: holds what looks like a password, key or token",
    ),
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


def test_code_that_the_bases_configuration_names_goes_with_it(run: Path, hub: Hub) -> None:
    (run / "model/modeling.py").write_text("x = 1")
    edit(run / "model/config.json", lambda tree: tree.update(auto_map={"AutoModel": "modeling.Model"}))
    record(run)
    push(run, "user/safer")
    assert hub.files["user/safer"]["modeling.py"] == b"x = 1"


def test_weights_in_the_middle_of_a_run_may_be_cleared_away_but_not_changed(run: Path) -> None:
    state = run / "stages/1-repair-1/state.safetensors"
    state.write_text("weights")
    edit(
        run / "manifest.json",
        lambda tree: tree["stages"]["repair-1"]["outputs"].update({str(state.relative_to(run)): sha256(state)}),
    )
    stages = Manifest.read(run).stages
    for name, (before, _) in STEPS.items():
        stages[name].after.update({step: stages[step].digest for step in before})
    (run / "manifest.json").write_text(Manifest.read(run).model_copy(update={"stages": stages}).model_dump_json())
    assert push(run, "user/safer", dry_run=True) is None
    state.write_text("others")
    with pytest.raises(UserError, match=r"state\.safetensors: missing, or changed since its step wrote it"):
        push(run, "user/safer", dry_run=True)
    state.unlink()
    assert push(run, "user/safer", dry_run=True) is None


def test_a_card_of_the_base_that_cannot_be_read_is_named(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(Path(Manifest.read(run).recipe["model"]["name_or_path"]), tmp_path / "base")
    for content in (b"---\nlicense: [\n---\n", b"---\nlicense: \xff\n---\n"):
        (base / "README.md").write_bytes(content)
        with pytest.raises(UserError, match=r"README\.md: the base's card cannot be read for its licence"):
            licence_of({"name_or_path": str(base)})


def test_a_step_of_a_former_recipe_is_neither_evidence_nor_published(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    former = {"status": "finished", "inputs": "0", "started": "", "after": {"repair-1": "0" * 64}}
    former["outputs"] = {"stages/10-repair-5/log.json": "0" * 64}
    edit(run / "manifest.json", lambda tree: tree["stages"].update({"repair-5": former}))
    out = printed(run, "--dry-run", capfd=capfd)
    assert "10-repair-5" not in out and '"repair-1"' in out


def test_a_run_without_any_attack_is_refused(run: Path) -> None:
    for key in ("asr_seen", "asr_unseen"):
        without(key)(run)
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
    for name in ("patch.safetensors", "patch.json"):
        (run / name).rename(run / f"kept-{name}")
    record(run)
    with pytest.raises(UserError, match="holds no patch"):
        push(run, "user/safer", patch_only=True)
    out = printed(run, "--dry-run", capfd=capfd)
    assert "config.json" in out and "routealign apply" not in out
    for name in ("patch.safetensors", "patch.json"):
        (run / f"kept-{name}").rename(run / name)
    shutil.rmtree(run / "model")
    record(run)
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


HTML = b"<html><body>Sign in to the network</body></html>"
NO_JSON: dict[str, tuple[str, tuple[int, bytes, dict[str, str]]]] = {
    "create: exists, without an address": ("/repos/create", (409, b'{"error": "exists"}', {})),
    "create: a page": ("/repos/create", (200, HTML, {"Content-Type": "text/html"})),
    "create: a page in JSON": ("/repos/create", (200, b'"<html>"', {})),
    "create: a list": ("/repos/create", (200, b"[1]", {})),
    "create: nothing": ("/repos/create", (200, b"", {})),
    "create: null": ("/repos/create", (200, b"null", {})),
    "create: no address": ("/repos/create", (200, b'{"url": 7}', {})),
    "create: bytes": ("/repos/create", (200, b"\xff\xfe\x00", {})),
    "create: deep": ("/repos/create", (200, b"[" * 10**5, {})),
    "create: cut": ("/repos/create", (200, b'{"url"', {"Content-Length": "900"})),
    "create: away": ("/repos/create", (307, b"", {"Location": "http://["})),
    "create: round": ("/repos/create", (307, b"", {"Location": "/api/repos/create"})),
    "create: broken": ("/repos/create", (500, HTML, {})),
    "create: later": ("/repos/create", (429, b"", {"Retry-After": "86400"})),
    "files: a page": ("/preupload/main", (200, HTML, {})),
    "files: a list": ("/preupload/main", (200, b"[]", {})),
    "files: others": ("/preupload/main", (200, b'{"files": [{"path": "x"}]}', {})),
    "files: none": ("/preupload/main", (200, b'{"files": []}', {})),
    "files: later": ("/preupload/main", (503, b"", {"Retry-After": "86400"})),
    "large: a page": ("/objects/batch", (200, HTML, {})),
    "large: a list": ("/objects/batch", (200, b"[]", {})),
    "large: none": ("/objects/batch", (200, b'{"objects": [{}]}', {})),
    "commit: a page": ("/commit/main", (200, HTML, {})),
    "commit: a list": ("/commit/main", (200, b"[]", {})),
    "commit: empty": ("/commit/main", (200, b"{}", {})),
    "commit: numbers": ("/commit/main", (200, b'{"commitUrl": 1, "commitOid": 2}', {})),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_an_answer_that_no_hub_gives_is_one_line(
    case: str, hub: Hub, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    end, answer = NO_JSON[case]
    hub.spoiled[end] = answer
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(finished), "--repo", "user/safer"])
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: user/safer: ")]) == 1
    assert hub.files.get("user/safer", {}) == {} and TOKEN not in err


@pytest.mark.parametrize("end", ["/repos/create", "/preupload/main", "/commit/main", "/api/models/user/safer"])
def test_a_hub_that_never_answers_is_given_up(
    end: str, hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    hub.spoiled[end] = None
    started = time.monotonic()
    with pytest.raises(UserError, match=r"user/safer: the Hub cannot be reached or refused"):
        push(finished, "user/safer", private=True)
    assert time.monotonic() - started < 8
    assert len([request for request in hub.requests if request.endswith(end)]) == 1


def test_a_hub_that_is_busy_for_ever_is_given_up(hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    text = b"Cannot create repo: another conflicting operation is in progress"
    hub.spoiled["/repos/create"] = (409, text, {})
    with pytest.raises(UserError, match="busy with another operation of yours"):
        push(finished, "user/safer")


def test_a_file_that_changes_on_the_way_is_not_sent(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*given: Any, **more: Any) -> Any:
        uploads = gather(*given, **more)
        (run / "model/config.json").write_text("{}")
        return uploads

    gather = pushing.gather
    monkeypatch.setattr(pushing, "gather", swapped)
    with pytest.raises(UserError, match=r"config\.json: changed while it was being pushed"):
        push(run, "user/safer")
    assert hub.requests == []


@pytest.mark.parametrize("endpoint", ["", "huggingface", "ftp://host", "http://[", "http://host:99999999/x y"])
def test_an_address_of_the_hub_that_is_none_is_refused_by_name(
    endpoint: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match=r"HF_ENDPOINT: found '.*', allowed: https://host"):
        push(finished, "user/safer")


@pytest.mark.parametrize(
    "answer", [None, (200, HTML, {}), (200, b"[]", {}), (200, b"{}", {}), (200, b"[" * 10**5, {})]
)
def test_a_base_on_a_hub_that_gives_no_answer_is_refused_in_one_line(
    answer: Spoiled,
    hub: Hub,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.spoiled["/owner/name/revision/main"] = hub.spoiled["/owner/name"] = answer
    with pytest.raises(SystemExit) as stopped:
        main(["apply", "owner/name", str(finished), "--out", str(tmp_path / "out")])
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err and not (tmp_path / "out").exists()
    assert len([line for line in err.splitlines() if line.startswith("error: owner/name: ")]) == 1
