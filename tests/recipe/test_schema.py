import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from trainer.methods.table import METHODS, load_recipe, recipe_of, recipe_schema
from trainer.recipe.schema import Recipe
from trainer.recipe.yaml import dump_yaml, read_yaml

Load = Callable[..., Recipe]

# override -> what the one line must say: the key, what was found, what is allowed.
BAD_VALUES = {
    "detect.top_k=2.5": ["detect.top_k", "2.5", "share of all routed experts"],
    "detect.top_k=0": ["detect.top_k", "found 0", "share of all routed experts"],
    "detect.top_k=true": ["detect.top_k", "true (bool)"],
    "detect.top_k=.nan": ["detect.top_k", "nan"],
    "detect.tokens=promt": ["detect.tokens", "'promt'", "'response'", "did you mean 'prompt'"],
    "detect.batch_size=0": ["detect.batch_size", "found 0", "1"],
    "detect.batch_size='8'": ["detect.batch_size", "'8' (str)", "integer"],
    "evaluate.random_control=1": ["evaluate.random_control", "1 (int)", "boolean"],
    "detect.tok=prompt": [
        "detect.tok",
        "unknown key",
        "did you mean",
        "allowed: max_new_tokens, batch_size, max_pairs, tries_per_pair, tokens, score",
    ],
    "run.seed=-1": ["run.seed", "-1", "0"],
    "run.name=a/b": ["run.name", "'a/b'", "letters, digits"],
    "run.name=..": ["run.name", "'..'", "letters, digits"],
    "run.name=12": ["run.name", "12 (int)", "string"],
    "run.name=": ["run.name", "null", "string"],
    "run.nmae=x": ["run.nmae", "did you mean 'name'", "allowed: name, seed, output_dir"],
    "model.dtype=fp16": ["model.dtype", "'fp16'", "'float16'"],
    "model.quantization=nf4": ["model.quantization", "'nf4'", "'4bit'"],
    "method=steer": ["method", "'steer'", "'rasa'"],
    "repiar.scope=full": ["repiar", "did you mean 'repair'"],
    "repair=5": ["repair", "5 (int)", "mapping"],
    "repair.retain_weight=-1": ["repair.retain_weight", "-1", "greater than or equal to 0"],
    "detect.recombined=1.5": ["detect.recombined", "1.5", "less than 1"],
    "repair.lora_alpha=16": ["repair.lora_alpha", "16", "lora_rank is not set"],
    "consistency.temperature=0": ["consistency.temperature", "0", "greater than 0"],
    "schedule.order=[repair, repair]": ["schedule.order", "['repair', 'repair']", "schedule.rounds"],
    "schedule.order=[]": ["schedule.order", "found []", "stages of one round"],
    "schedule.order=[repiar]": ["schedule.order.0", "'repiar'", "did you mean 'repair'"],
    "evaluate.refusal_markers=[]": ["evaluate.refusal_markers", "found []", "null"],
    "data.harmful.train=-5": ["data.harmful.train", "-5"],
    "data.harmful.format=csv": ["data.harmful.format", "'csv'", "'records'"],
    "data.harmfull.path=x": ["data.harmfull", "did you mean 'harmful'", "allowed: harmful"],
    "data.capability=[{name: a, path: b, metrik: c}]": ["data.capability.0.metrik", "did you mean 'metric'"],
    "data.benign=null": ["data.benign", "null", "mapping"],
}

BAD_TRAINER_ARGS = {
    "repair.learning_rat=5": ["repair.learning_rat", "did you mean 'learning_rate'", "of SFTConfig"],
    "repair.learning_rate=fast": ["repair.learning_rate", "'fast' (str)", "number"],
    "repair.learning_rate=-1": ["repair.learning_rate", "-1", "at least 0"],
    "repair.max_steps=true": ["repair.max_steps", "true (bool)", "integer"],
    "repair.per_device_train_batch_size=0": ["repair.per_device_train_batch_size", "found 0", "at least 1"],
    "repair.lr_scheduler_type=consine": ["repair.lr_scheduler_type", "'consine'", "cosine"],
    "repair.output_dir=x": ["repair.output_dir", "'x'", "run.output_dir"],
    "repair.seed=1": ["repair.seed", "found 1", "run.seed"],
    "repair.router_aux_loss_coef=0.01": ["repair.router_aux_loss_coef", "0.01", "expected 0"],
    "repair.router_aux_loss_coef=null": ["repair.router_aux_loss_coef", "null", "expected 0"],
    "repair.gradient_checkpointing_kwargs={use_reentrant: true}": ["gradient_checkpointing_kwargs", "no gradient"],
    "repair.packing=true": ["repair.packing", "true", "expected false"],
    "repair.padding_free=true": ["repair.padding_free", "true", "expected false"],
    "repair.load_best_model_at_end=true": ["repair.load_best_model_at_end", "expected false"],
    "repair.hub_token=abc": ["repair.hub_token", "HF_TOKEN"],
    "consistency.packing=true": ["consistency.packing", "unknown key", "of TrainingArguments"],
}


@pytest.mark.parametrize(("override", "words"), [*BAD_VALUES.items(), *BAD_TRAINER_ARGS.items()])
def test_a_bad_value_is_named_in_one_line(load: Load, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("override: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("override", ["run.name", "=x", "run..name=x", "run.name=[", "run.name=a: b: c"])
def test_an_override_that_is_none(load: Load, override: str) -> None:
    with pytest.raises(UserError, match="override") as caught:
        load(override)
    assert override in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_through_a_value(load: Load) -> None:
    with pytest.raises(UserError, match=r"run\.name is 'first' and holds no keys"):
        load("run.name.x=1")
    with pytest.raises(UserError, match="expected 0 to 0, found '3'"):
        load("data.jailbreaks.seen.3=x")


def test_overrides_are_typed_by_yaml_and_reach_everywhere(load: Load) -> None:
    recipe = load(
        "run.seed=7", "detect.top_k=12", "repair.learning_rate=5e-5", "data.jailbreaks.seen.0=z", "repair.bf16=no"
    )
    assert recipe.run.seed == 7
    assert recipe.detect.top_k == 12 and isinstance(recipe.detect.top_k, int)
    assert recipe.repair.given_arguments == {"learning_rate": 5e-5, "bf16": False}
    assert recipe.data.jailbreaks.seen == ["z"]
    assert load("detect.top_k=0.5").detect.top_k == 0.5


def test_allowed_values_of_what_is_refused_otherwise(load: Load) -> None:
    recipe = load(
        "repair.router_aux_loss_coef=0.0",
        "repair.packing=false",
        "repair.gradient_checkpointing_kwargs={use_reentrant: false}",
    )
    assert recipe.repair.given_arguments["packing"] is False


def test_the_file_is_named_where_the_file_is_at_fault(recipe_file: Path, tree: dict[str, Any]) -> None:
    tree["detect"] = {"tokns": "both"}
    recipe_file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="unknown key; did you mean 'tokens'") as caught:
        load_recipe(recipe_file, ["run.seed=1"])
    assert str(caught.value).startswith(f"{recipe_file}: detect.tokns: ")


@pytest.mark.parametrize("key", ["run", "model", "data", "run.name", "model.name_or_path", "data.harmful"])
def test_a_missing_key(recipe_file: Path, tree: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    owner = tree
    for name in sections:
        owner = owner[name]
    del owner[last]
    recipe_file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f": {key}: missing"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "found a list"),
        ("hello", "found a str"),
        ("run: {name: a\nmodel: b", "line 2"),
        ("run:\n  name: a\n  name: b\n", "line 3, column 3: not YAML: the key 'name' is given twice"),
        ("run: !!python/object:os.system {}", "line 1"),
        ("run: 2024-13-45", "not YAML"),
        ("a: *nothing", "line 1"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_an_empty_section_has_its_defaults(recipe_file: Path, tree: dict[str, Any]) -> None:
    tree["repair"] = None
    recipe_file.write_text(yaml.safe_dump(tree))
    assert load_recipe(recipe_file).repair.scope == "experts"


def test_the_resolved_recipe_loads_to_the_same(load: Load, tmp_path: Path) -> None:
    recipe = load(
        "repair.learning_rate=5e-5",
        "repair.max_steps=3",
        "detect.top_k=6",
        "run.name=1e5x",
        "data.harmful.column='1e5'",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.resolved_yaml())
    again = load_recipe(path)
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert again.resolved_yaml() == recipe.resolved_yaml()


def test_hashes(load: Load) -> None:
    base, other = load(), load("evaluate.batch_size=3")
    assert base.hash() == load().hash() != other.hash()
    assert base.hash("data", "run.seed") == other.hash("data", "run.seed")
    assert base.hash("evaluate") != other.hash("evaluate")
    assert base.hash("data", "model") == base.hash("model", "data")
    assert base.hash("repair") != load("repair.max_steps=3").hash("repair")
    with pytest.raises(KeyError):
        base.hash("nothing")


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("steermoe", "repair.scope=full", ["repair", "a section of method rasa", "this recipe's method is steermoe"]),
        ("steermoe", "export.patch=false", ["export", "a section of method rasa"]),
        ("steermoe", "detect.top_k=8", ["detect.top_k", "unknown key", "allowed: max_new_tokens"]),
        ("steermoe", "evaluate.steering_baseline=true", ["evaluate.steering_baseline", "unknown key"]),
        ("steermoe", "data.harmful=null", ["data.harmful", "steer.contrast safety needs it"]),
        ("rasa", "data.benign=null", ["data.benign", "null"]),
        ("rasa", "evaluate.judge=phrase", ["evaluate.judge", "'phrase'", "did you mean 'phrases'"]),
    ],
)
def test_a_key_of_another_method_is_refused(load: Load, method: str, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(f"method={method}", override)
    line = str(caught.value)
    assert line.startswith("override: ") and "\n" not in line
    for word in words:
        assert word in line


def test_a_method_does_without_data_that_it_does_not_need(tree: dict[str, Any]) -> None:
    tree["data"] = {"capability": [{"name": "sums", "path": "sums.jsonl"}]}
    with pytest.raises(UserError, match=r"data\.harmful: missing, and method rasa needs it"):
        recipe_of(tree, source="here")
    tree |= {"method": "steermoe", "steer": {"contrast": "custom", "pairs": "pairs.jsonl"}}
    recipe = recipe_of(tree, source="here")
    assert recipe.data.harmful is None
    assert set(recipe.files("data", "steer")) == {"sums.jsonl", "pairs.jsonl"}, "files are found by their mark"


def test_the_schema_is_a_union_by_method() -> None:
    schema = recipe_schema()
    assert schema["discriminator"]["propertyName"] == "method"
    assert set(schema["discriminator"]["mapping"]) == set(METHODS)


def test_every_key_is_described() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    for name, section in schema["$defs"].items():
        for key, field in section.get("properties", {}).items():
            is_section = "$ref" in field
            assert is_section or field.get("description"), f"{name}.{key} has no description"


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz_", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=PLAIN | st.from_regex(r"[-+]?[0-9_.]{1,4}[eE][-+]?[0-9]{1,2}", fullmatch=True))
def test_what_is_dumped_reads_back(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(dump_yaml({"value": value}), encoding="utf-8")
    assert read_yaml(path) == {"value": value}
