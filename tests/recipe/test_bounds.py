"""Values of a recipe that no run should begin with are refused by key, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from tests.minimal_recipe import MINIMAL
from trainer.cli import app as cli
from trainer.methods.table import load_recipe
from trainer.recipe.schema import Recipe
from trainer.recipe.trainer_arguments import BOUNDS, OTHERS_ALLOWED

Load = Callable[..., Recipe]

TOO_MUCH = {
    "repair.weight_decay=.inf": "repair.weight_decay: found inf",
    "repair.weight_decay=1e400": "repair.weight_decay: found inf",
    "repair.learning_rate=.nan": "repair.learning_rate: found nan",
    "repair.lr_scheduler_kwargs={a: [.inf]}": "repair.lr_scheduler_kwargs.a.0: found inf",
    "consistency.temperature=-.inf": "consistency.temperature: found -inf",
    "detect.top_k=1e400": "detect.top_k: found inf",
    "detect.max_pairs=1000000": "detect.max_pairs: found 1000000",
    "detect.bootstrap=1000000000000": "detect.bootstrap: found 1000000000000",
    "schedule.rounds=1000000000": "schedule.rounds: found 1000000000",
    "repair.recombined=1e9": "repair.recombined: found 1000000000.0",
    "repair.robust=1e9": "repair.robust: found 1000000000.0",
    "repair.lora_rank=1000000": "repair.lora_rank: found 1000000",
    "evaluate.max_new_tokens=10000000": "evaluate.max_new_tokens: found 10000000",
    "run.seed=4294967295": "run.seed: found 4294967295",
    f"run.seed={10**40}": "run.seed: found a number of 133 bits",
    "repair.max_steps=10000000000": "repair.max_steps: found 10000000000",
    "repair.max_steps=0": "repair.max_steps: found 0 (int), expected 1 or more, or -1",
    "repair.max_steps=0.5": "repair.max_steps: found 0.5",
    "repair.num_train_epochs=0": "repair.num_train_epochs: found 0",
    "repair.save_steps=0.5": "repair.save_steps: found 0.5",
    "export.max_shard_size=99999999999GB": "export.max_shard_size",
    'run.output_dir="a\\0b"': "run.output_dir: found a NUL character",
    'run.output_dir="a\\nb"': "run.output_dir",
    'run.output_dir="~/runs"': "run.output_dir: found '~/runs'",
    'model.name_or_path="\\uD800"': "model.name_or_path: found half a surrogate",
    "run.name=2024-01-01": "run.name: found datetime.date",
    'steer.refusal=" "': "steer.refusal: found ' '",
    "evaluate={1: 2}": "evaluate: found the key 1 (int)",
    "evaluate={null: 2}": "evaluate: found the key None",
}


@pytest.mark.parametrize("override", TOO_MUCH)
def test_a_value_beyond_sense_is_refused_by_key(load: Load, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert TOO_MUCH[override] in str(caught.value) and "\n" not in str(caught.value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 10)}]\n" for name in "bcdefghi"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: " + "[" * 40 + "]" * 40, "more than 32 levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: &x [*x]", "more than 32 levels"),
        ("null: 1", "found the key None (NoneType), expected text"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("a: !!binary aGVsbG8=", "a: found b'hello' (bytes)"),
        ("a: 0x" + "f" * 9000, "a: found a number of 36000 bits"),
    ],
)
def test_a_file_that_is_no_recipe_at_all_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/zero", "/dev/zero: found more than 10,000,000 bytes; expected a recipe"),
        ("a\0b", "names no file"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("/dev/null", "the file is empty"),
    ],
)
def test_a_place_that_holds_no_recipe_is_refused_by_name(path: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(Path(path))
    assert words in str(caught.value)


def test_what_an_alias_shares_is_not_changed_with_it(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["data"]["borderline"] = tree["data"]["benign"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert "*id" in path.read_text()
    recipe = load_recipe(path, ["data.benign.train=7"])
    assert recipe.data.benign and recipe.data.benign.train == 7
    assert recipe.data.borderline and recipe.data.borderline.train == 0


# --- the trainer's own arguments -------------------------------------------------------------------

WITHOUT_EFFECT = {
    "label_smoothing_factor=0.5": "the method's own",
    "assistant_only_loss=true": "the method's own",
    "completion_only_loss=false": "the method's own",
    "loss_type=dft": "the method's own",
    "use_liger_kernel=true": "the method's own",
    "neftune_noise_alpha=5.0": "the original model too",
    "eos_token=x": "chat template",
    "pad_token=x": "padding is masked",
    "chat_template_path=x.jinja": "the model's own",
    "push_to_hub=true": "routealign push",
    "hub_model_id=a/b": "routealign push",
    "eval_strategy=steps": "evaluation loop",
    "per_device_eval_batch_size=1": "evaluation loop",
    "auto_find_batch_size=true": "per_device_train_batch_size",
    "dataset_text_field=nowhere": "the section data",
    "truncation_mode=keep_end": "max_length",
    "save_strategy=epoch": "save_steps",
    "save_total_limit=5": "save_steps",
    "torch_compile=true": "hooks",
    "dataloader_drop_last=false": "not full is dropped",
    "dataset_kwargs={skip_prepare_dataset: false}": "the section data",
    "shuffle_dataset=true": "new order",
    "accelerator_config={even_batches: false}": "launch.sh --engine",
    "deepspeed=x.json": "launch.sh --engine",
    "lr_scheduler_type=reduce_lr_on_plateau": "metric",
    "optim=lomo": "backward pass",
    "use_cache=true": "no effect here",
    "include_num_input_tokens_seen=true": "no effect here",
}


@pytest.mark.parametrize("setting", WITHOUT_EFFECT)
def test_a_trainers_setting_that_would_change_nothing_is_refused_by_name(load: Load, setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"override: repair\.{key}: found ") as caught:
        load(f"repair.{setting}")
    assert WITHOUT_EFFECT[setting] in str(caught.value)


def test_rows_of_the_consistency_stage_have_no_one_length(load: Load) -> None:
    load("repair.train_sampling_strategy=group_by_length")
    with pytest.raises(UserError, match="no one length"):
        load("consistency.train_sampling_strategy=group_by_length")


def test_every_argument_that_is_taken_is_one_of_the_libraries() -> None:
    from transformers import TrainingArguments
    from trl import SFTConfig

    fields = {**SFTConfig.__dataclass_fields__, **TrainingArguments.__dataclass_fields__}
    assert (BOUNDS.keys() | OTHERS_ALLOWED) <= fields.keys()


# --- anything at all -------------------------------------------------------------------------------

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAF, inner, max_size=3), max_leaves=6
)
KEYS = [
    ("run", "name"), ("run", "seed"), ("run", "output_dir"), ("model",), ("model", "dtype"), ("data",),
    ("data", "harmful"), ("data", "harmful", "train"), ("data", "jailbreaks", "seen"), ("data", "capability"),
    ("detect",), ("detect", "top_k"), ("detect", "bootstrap"), ("repair",), ("repair", "lora_alpha"),
    ("repair", "learning_rate"), ("repair", "warmup_steps"), ("repair", "any"), ("consistency", "temperature"),
    ("schedule", "order"), ("evaluate", "refusal_markers"), ("export", "max_shard_size"), ("steer", "sweep"),
    ("method",), ("any",),
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUE)
def test_any_value_anywhere_is_taken_whole_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: tuple[str, ...], value: Any
) -> None:
    tree = json.loads(json.dumps(MINIMAL))
    at = tree
    for part in key[:-1]:
        at = at.setdefault(part, {})
    at[key[-1]] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.dump(tree), encoding="utf-8")
    try:
        recipe = load_recipe(path)
    except UserError as error:
        assert str(error).startswith(str(path)), error
        with pytest.raises(SystemExit) as left:
            cli.main(["run", str(path)])
        err = capsys.readouterr().err
        assert left.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        return
    assert type(recipe).of(json.loads(json.dumps(recipe.tree(), allow_nan=False)), source="kept") == recipe
