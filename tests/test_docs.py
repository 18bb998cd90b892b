"""The pages of docs/ name every key that is written, the README's snippet runs, and what they point at is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from data_prep.organism.build import Organism
from tests.methods.alignx.test_alignx import tree_of as alignx_tree
from tests.organism import Small
from tests.reporting.conftest import evaluation, metrics
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.moe import expert_set, steering_file
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.steering import Steering
from trainer.moe.steering_file import SteeringFile
from trainer.moe.steering_gate import Gate

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Under these a key is a name from the run, not from us.
NAMED_BY_THE_RUN = {"ablation", "asr", "capability", "changes", "by_layer", "experts_per_layer", "top_k", "versions"}

RATE = {"rate", "n", "ci95", "unjudged"}
RASA = {
    *("router_restore_gap", "topk_flip_rate", "drift_per_layer", "layer", "flip_rate", "kl"),
    *("experts_changed", "experts_total", "shared_experts_changed", "gate_weights_changed", "untouched_identical"),
    *("stages", "stage", "kind", "routing_gap", "refusal_loss", "works_on", "acted", "before", "after"),
    *("random_control", "attention_control", "steering_baseline"),
}
STEERMOE = {
    *("topk_flip_rate", "random_control", "random_draws", "bottom_control"),
    *("steering", "strength", "forced", "tokens_changed", "layer", "expert", "active", "share"),
    *("gate", "held_out_balanced_accuracy", "by_layer", "harmful", "harmless"),
    *("perplexity", "before", "after", "ungated"),
    *("sweep", "n_pos", "n_neg", "gated", "metrics", "impossible"),
}
LOMC = {
    *("experts_changed", "experts_total", "shared_experts_changed", "gate_weights_changed", "untouched_identical"),
    *("correction", "written", "strength", "kinds", "kl", "safety", "figure", "change", "worst", "within"),
    *("footprint", "units", "experts", "layers", "parameters", "of_parameters", "relative_change", "unchanged"),
    *(
        "later",
        "left",
        "tried",
        "fitted",
        "held_out",
        "wrong",
        "right",
        "harmful",
        "clustering",
        "prototypes",
        "layer",
        "dropped",
        "auc",
        "cosine",
        "number",
        "kept",
        "answered",
    ),
    *("ablation", "within_bounds", "metrics"),
}
ALIGNX = {"untouched_identical"}
AXES = {
    *("alignx", "axes", "baselines", "router", "forgetting", "cost", "base", "joint", "static", "uniform"),
    *("accuracy", "ece_before", "ece_after", "brier", "n", "routed", "bank", "figures", "dropped", "evidence"),
    *("kept", "reason", "gains", "ablation", "gate_shuffled", "after", "lost"),
    *("seconds", "parameter_bytes", "peak_bytes", "latency", "parameters", "peak", "mlp_mixture"),
    *(f"mixture_{mode}" for mode in ("weights", "top1", "hidden")),
    *(f"head_gate_{pieces}" for pieces in ("only", "fractal", "natural", "fractal_natural")),
}
DIAGNOSTICS = {"rasa": RASA, "steermoe": STEERMOE, "lomc": LOMC, "alignx": ALIGNX}


def keys_of(tree: Any) -> Iterator[str]:
    """Every key of a JSON value, wherever in it."""
    if isinstance(tree, list):
        for item in tree:
            yield from keys_of(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from keys_of(list(value.values()) if key in NAMED_BY_THE_RUN and isinstance(value, dict) else value)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def named_on(name: str) -> set[str]:
    """Words in backticks on a page, paths such as `gate.layer` taken apart."""
    spans = re.findall(r"`([^`\n]+)`", page(name))
    return {word for span in spans for word in re.split(r"[^\w]+", span)}


def test_every_figure_is_defined() -> None:
    keys = (
        set(keys_of(evaluation())) | set(keys_of(metrics(True))) | RATE | {"version"} | RASA | STEERMOE | LOMC | AXES
    )
    assert not keys - named_on("evaluation-json.md")


def check_axes(found: dict[str, Any]) -> None:
    """Names of axes, steps and pieces are the run's; every other key is on the page."""
    assert set(found) | set(found["baselines"]) | set(found["cost"]) <= AXES | set(found["axes"])
    router, bank = found["router"], found["router"]["bank"]
    rows = [*bank["evidence"].values(), *bank["ablation"].values(), *found["cost"].values()]
    assert set(router) | set(bank) | {key for row in rows for key in row} <= AXES
    assert set(found["forgetting"]) == {"after", "lost"}
    rates = [*found["axes"].values(), *(rate for of in found["baselines"].values() for rate in of.values())]
    assert all(set(rate) == RATE for rate in rates)


@pytest.mark.slow
@pytest.mark.parametrize("method", DIAGNOSTICS)
def test_every_key_of_a_run_is_defined(method: str, small: Small, organism: Organism, root: Path) -> None:
    """The lists above are what runs write, with every option on that adds a key."""
    from trainer.cli.app import main

    recipe = small()
    tree = yaml.safe_load(recipe.read_text())
    if method == "rasa":
        tree["evaluate"] = {"random_control": True, "attention_control": True, "steering_baseline": True}
        tree["steer"] = {"n_pos": 2}
    elif method == "lomc":
        tree = {"method": method} | {name: tree[name] for name in ("run", "model", "data")}
        tree["detect"] = {"kinds": ["experts", "mixer"], "top_k": 32, "prototypes": [1]}
        tree["correct"] = {"strengths": [2.0], "max_kl": 100.0, "max_loss": 1.0}
        mistaken = ["the history of", "the word", "put the", "the seventh law", "it is a crime"]
        tree["evaluate"] = {"ablation": True, "refusal_markers": ["i'm sorry", "i can't", "sorry, i", *mistaken]}
    elif method == "alignx":
        tree = alignx_tree(organism, Path(tree["run"]["output_dir"]))
        tree["evaluate"] |= {"baselines": True, "cost": True}
    else:
        tree = {"method": method} | {name: tree[name] for name in ("run", "model", "data")}
        tree["detect"] = {"max_pairs": 16}
        tree["steer"] = {"n_pos": 2, "gate": True, "sweep": {"n_neg": [2, 60], "prompts": 2}}
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe)])
    assert ended.value.code == 0
    folder = Path(tree["run"]["output_dir"]) / tree["run"]["name"]
    found = json.loads((folder / "evaluation.json").read_text())
    if method == "alignx":
        check_axes(found.pop("alignx"))
    assert set(keys_of(found)) <= named_on("evaluation-json.md")
    figures = set(keys_of([found["before"], found["after"]]))
    assert set(keys_of(found["diagnostics"])) - figures == DIAGNOSTICS[method] - figures
    files = {"expert_set.json": "expert-set-json.md", "steering.json": "steering-json.md"}
    files |= {"patch.json": "patch-json.md", "audit.json": "release.md"}
    for name, where in files.items():
        if (folder / name).exists():
            written = json.loads((folder / name).read_text())
            assert set(written) <= named_on(where), name
            assert set(written.get("about", {})) <= named_on("expert-set-json.md"), name


def fields_of(model: type[BaseModel]) -> Iterator[str]:
    """Names of the fields of a class and of the classes of ours that they hold."""
    for name, field in model.model_fields.items():
        yield name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields_of(inner)


def test_every_key_of_a_patch_is_defined() -> None:
    from trainer.release.patch import About

    assert {"rows", "metadata", "revision"} <= set(fields_of(About))
    assert not {*fields_of(About), "sha256"} - named_on("patch-json.md")


def test_every_key_of_a_steering_is_defined() -> None:
    backbone = Backbone.of(tiny_model()).check()
    gate = Gate(0, (0.0,) * 32, 0.0, {})
    made = SteeringFile.of(backbone, Steering({0: (1,)}), model="tiny", gate=gate)
    assert not set(keys_of(json.loads(made.to_json()))) - {"0", "1", "2"} - named_on("steering-json.md")


def test_every_key_of_an_expert_set_is_defined() -> None:
    made = ExpertSet((Member(0, 1),), {0: 8})
    assert not set(keys_of(json.loads(made.to_json()))) - {"0"} - named_on("expert-set-json.md")
    about = {"score", "tokens", "topic_control", "difference", "with_equal_replies", "shared_experts"}
    about |= {"control", "seed", "method", "contrast", "table", "n_pos", "n_neg", "reverse", "dropped"}
    assert not about - named_on("expert-set-json.md")


def test_every_key_of_an_audit_is_defined() -> None:
    written = {
        *("untouched_identical", "moved_outside", "footprint", "tensors_changed", "experts_changed", "experts_total"),
        *("shared_experts_changed", "gate_weights_changed", "compared", "not_exported", "reload_ok", "not_moved"),
        *("files_differ", "not_as_trained", "reload_difference", "reload_max_logit_difference", "reload_tokens"),
        "reload_experts_reached",
    }
    assert not written - named_on("release.md")


def test_the_documented_versions_are_those_of_the_code() -> None:
    from trainer.pipeline.publish import EVALUATION_VERSION
    from trainer.release.patch import About

    assert f"version {EVALUATION_VERSION}:" in page("evaluation-json.md")
    assert f'"version": {EVALUATION_VERSION},' in page("evaluation-json.md")
    assert f"Format `{About.model_fields['format'].default}`" in page("patch-json.md")
    assert f"Format `{steering_file.FORMAT}`" in page("steering-json.md")
    assert f"Version {expert_set.VERSION}," in page("expert-set-json.md")


def test_the_readmes_snippet_prints_the_chosen_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert '".cache/organism/model"' in snippet
    exec(compile(snippet.replace(".cache/organism/model", str(tmp_path)), "README.md", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert len(lines) == 3
    assert all(re.match(rf"{layer} 8 \[\[\d, \d\]", line) for layer, line in enumerate(lines))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_points_at_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "log.md":
        return  # history: paths of their time
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        found = path.parent / target if target else path
        assert found.exists(), f"{path.name} links {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], anchor
    for named in re.findall(r"(?<![\w/.])((?:trainer|tests|data_prep|recipes|ds_configs)/[\w/.-]+\.\w+)", text):
        assert (ROOT / named).exists(), f"{path.name} names {named}"
    rooms = "|".join(sorted(child.name for child in (ROOT / "trainer").iterdir() if child.is_dir()))
    for named in re.findall(rf"(?<![\w/.])((?:{rooms})/(?!mine/)[\w/-]+\.py)", text):
        assert (ROOT / "trainer" / named).exists(), f"{path.name} names {named}"
    for module in re.findall(r"python -m ((?:trainer|tests|data_prep)[\w.]*)", text):
        at = ROOT / module.replace(".", "/")
        assert at.is_dir() or at.with_suffix(".py").exists(), f"{path.name} runs {module}"


def test_every_test_that_the_page_of_checks_names_is_there() -> None:
    page = (ROOT / "docs" / "limits-we-check.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        found for path in (ROOT / "tests").rglob("*.py") for found in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 40 and not named - there
