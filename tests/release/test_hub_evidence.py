"""What is never pushed: a run whose files, figures, recipe or steps are not what the run made."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from tests.release.finished_run import STEPS, edit, finished, hub, printed, record, run
from tests.release.hub_server import Hub
from tests.reporting.conftest import rate
from trainer.cli.app import main
from trainer.pipeline.push import push
from trainer.release.hub import licence_of
from trainer.run.manifest import Manifest
from trainer.runtime.files import sha256

__all__ = ["finished", "hub", "run"]


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
    "a change made certain": (
        forged(lambda tree: tree.update(changes={"asr_seen": {"difference": -1.0, "ci95": [-1.0, -1.0], "p": 0.0}})),
        "evaluation.json: changes:",
    ),
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
        lambda run: edit(run / "audit.json", lambda tree: tree.update(gate_weights_changed=0.5)),
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


def test_kept_replies_and_their_grades_stay_here(run: Path, hub: Hub) -> None:
    for name in ("replies/evaluate-after.jsonl", "replies/inspect/x.json", "judges.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text('{"reply": "a kept secret"}')
    push(run, "user/safer")
    sent = hub.files["user/safer"]
    assert sent and not [
        name for name, content in sent.items() if "repl" in name or "judges" in name or b"kept secret" in content
    ]


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
