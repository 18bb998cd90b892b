"""Parameters, steps and memory that a plan names, against the real modules and against arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedConfig, Qwen3MoeConfig

from data_prep.errors import UserError
from tests.moe.families import FAMILIES as MOE_FAMILIES
from tests.planning.measure import recipe as small_recipe
from tests.tiny import FAMILIES, tiny_model
from trainer.cli import app as cli
from trainer.engines.memory import ENGINES
from trainer.methods.rasa.plan import critical, planned
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.methods.table import recipe_of
from trainer.moe.backbone import Backbone
from trainer.moe.experts import SplitModel
from trainer.planning import plan as planning
from trainer.planning import rehearsal, workload
from trainer.planning.parts import count, on_meta
from trainer.planning.plan import Plan
from trainer.planning.planned import PlannedStage
from trainer.planning.rehearsal import rehearse
from trainer.planning.sizes import measure
from trainer.training.loop import parameter_counts
from trainer.training.under_repair import trained_attention, under_repair


def changed(made: RasaRecipe, **sections: dict[str, Any]) -> RasaRecipe:
    tree = made.tree()
    for name, keys in sections.items():
        tree[name] |= keys
    again = recipe_of(tree, source="x")
    assert isinstance(again, RasaRecipe)
    return again


def plan(made: RasaRecipe, config: PreTrainedConfig, *, gpus: int, gpu_memory_gb: float | None = None) -> Plan:
    return planning.plan(made, planned(made), config, gpus=gpus, gpu_memory_gb=gpu_memory_gb)


def stage_of(made: RasaRecipe, name: str) -> PlannedStage:
    return next(stage for stage in planned(made).stages() if stage.name == name)


@pytest.fixture(scope="module")
def qwen3_30b() -> PreTrainedConfig:
    """The published sizes of Qwen3-30B-A3B."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "dtype": "bfloat16"}
    return Qwen3MoeConfig(**sizes, **heads, **experts, tie_word_embeddings=False, max_position_embeddings=40960)


@pytest.fixture(scope="module")
def big() -> RasaRecipe:
    return changed(small_recipe({"full"}), model={"dtype": "bfloat16"}, repair={"max_length": 512})


@pytest.fixture(scope="module")
def on_8(big: RasaRecipe, qwen3_30b: PreTrainedConfig) -> Plan:
    return plan(big, qwen3_30b, gpus=8, gpu_memory_gb=80)


def test_published_sizes_are_counted(on_8: Plan) -> None:
    parts = on_8.parts
    assert round(parts.total / 1e9, 1) == 30.5
    assert 3.3e9 <= parts.active < 3.4e9
    assert parts.experts == 48 * 128 * 3 * 2048 * 768
    assert parts.routers == 48 * 128 * 2048
    assert parts.embeddings == 2 * 151936 * 2048
    assert (parts.routed_experts, parts.critical_experts) == (6144, 768)
    assert parts.critical * 8 == parts.experts  # detect.top_k is an eighth
    assert parts.trainable == {"repair": parts.critical, "consistency": parts.routers}
    assert parts.footprint == parts.critical + parts.routers
    assert parts.footprint_share == parts.footprint / parts.total


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_model(family: str) -> None:
    model = tiny_model(family)
    made = changed(small_recipe({"full"}), detect={"top_k": 4})
    parts = count(made.model, model.config, planned(made).footprint)
    named = [parts.embeddings, parts.attention, parts.experts, parts.shared_experts, parts.routers]
    assert sum([*named, parts.dense_mlps, parts.other]) == parts.total == sum(p.numel() for p in model.parameters())
    assert parts.dense_mlps == parts.shared_experts == 0
    assert min(named[:3]) > 0


@settings(max_examples=50, deadline=None)
@given(k=st.integers(1, 23))
def test_critical_experts_are_spread_evenly_from_the_first_layer(k: int) -> None:
    made = changed(small_recipe({"full"}), detect={"top_k": k})
    experts = critical(made, on_meta(made.model, tiny_model().config))
    counts = [len(experts.by_layer().get(layer, [])) for layer in experts.experts_per_layer]
    assert sum(counts) == k
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)


def test_a_top_k_that_takes_every_expert_is_refused() -> None:
    made = changed(small_recipe({"full"}), detect={"top_k": 24})
    with pytest.raises(UserError, match=r"detect\.top_k: 24 selects 24 experts; allowed: 1 to 23"):
        plan(made, tiny_model().config, gpus=1)


@pytest.mark.parametrize("case", ["full", "lora", "gates", "lora+gates", "whole"])
def test_trainable_parameters_are_those_of_the_real_stages(case: str) -> None:
    made = changed(small_recipe(set(case.split("+"))), detect={"top_k": 5})
    backbone = Backbone.of(tiny_model())
    trained = under_repair(backbone, critical(made, backbone), made.repair)
    trained.train_experts(routers=made.repair.train_gates)
    found = plan(made, tiny_model().config, gpus=1)
    assert found.parts.trainable["repair"] == parameter_counts(backbone.model)[0]


@pytest.mark.parametrize("scope", ["experts", "attention"])
def test_attention_is_planned_like_the_real_one(scope: str) -> None:
    keys = {"scope": scope, "attention": {"layers": 0.5, "projections": ["q_proj", "o_proj"]}}
    made = changed(small_recipe({"full"}), detect={"top_k": 5}, repair=keys)
    backbone = Backbone.of(tiny_model())
    of_attention = sum(p.numel() for m in trained_attention(backbone, made.repair).values() for p in m.parameters())
    trained = under_repair(backbone, critical(made, backbone), made.repair)
    trained.train_experts()
    found = plan(made, tiny_model().config, gpus=1)
    assert found.parts.trainable["repair"] == parameter_counts(backbone.model)[0]
    assert found.parts.footprint == of_attention + found.parts.critical + found.parts.routers
    assert (found.parts.critical_experts, found.parts.critical > 0) == (
        (5, True) if scope == "experts" else (0, False)
    )


def test_shared_experts_of_the_edit_are_planned_like_the_real_ones() -> None:
    made = changed(small_recipe({"full"}), detect={"top_k": 5, "shared_experts": True})
    model = next(family for family in MOE_FAMILIES if family.model_type == "qwen2_moe").build()
    backbone, without = Backbone.of(model), changed(made, detect={"shared_experts": False})
    shared = sum(p.numel() for p in backbone.shared_parameters().values())
    trained = under_repair(backbone, critical(made, backbone), made.repair)
    trained.train_experts()
    found = plan(made, model.config, gpus=1)
    assert found.parts.trainable["repair"] == parameter_counts(model)[0]
    former = plan(without, model.config, gpus=1)
    assert found.parts.trainable["repair"] == former.parts.trainable["repair"] + shared
    assert found.parts.footprint == former.parts.footprint + shared
    assert found._sizes["repair"].twins == former._sizes["repair"].twins + 4 * shared


def test_stages_are_planned_with_the_defaults_that_they_train_with() -> None:
    tree = small_recipe({"full"}).tree()
    for name in ("repair", "consistency"):
        del tree[name]
    made = recipe_of(tree, source="x")
    assert isinstance(made, RasaRecipe)
    for name, section in (("repair", made.repair), ("consistency", made.consistency)):
        training = stage_of(made, name).training
        assert training is not None and training.section == section
        assert training.length == made.repair.trainer_arguments["max_length"] == 512
        rows, (step,) = training.rows, (s for s in plan(made, tiny_model().config, gpus=1).steps() if s.stage == name)
        assert step.steps == 3 * -(-rows // section.trainer_arguments["per_device_train_batch_size"])


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.integers(1, 500), batch=st.integers(1, 32), processes=st.integers(1, 16), accumulation=st.integers(1, 4)
)
def test_steps_pass_every_row_once_an_epoch(pairs: int, batch: int, processes: int, accumulation: int) -> None:
    keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    made = changed(small_recipe({"full"}), detect={"max_pairs": pairs}, repair={**keys, "max_steps": -1})
    found = workload.steps(planned(made).stages(), processes)[0]
    a_step = batch * processes * accumulation
    assert (found.steps - 1) * a_step < found.rows <= found.steps * a_step
    assert found.tokens == found.steps * a_step * 128


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "stage"), [("gpt_oss", "repair"), ("olmoe", "consistency"), ("qwen3_moe", "evaluate")]
)
def test_kinds_of_layers_multiplied_are_the_whole_model(family: str, stage: str) -> None:
    config = tiny_model(family).config
    config.num_hidden_layers = 6
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention", "full_attention"] * 3
    rows = {"per_device_train_batch_size": 4}
    repair = {"max_length": 24, "retain_loss": "kl", **rows}
    made = changed(small_recipe({"full"}), detect={"top_k": 6}, repair=repair, consistency=rows)
    made = changed(made, evaluate={"batch_size": 4})

    def build() -> Backbone:
        return on_meta(made.model, config)

    forward, backward, start = rehearsal._on_layers(build, stage_of(made, stage), range(6), False)
    found = rehearse(build, stage_of(made, stage), checkpointing=False)
    assert found.peak == pytest.approx(max(forward, backward), rel=0.02)
    assert found.temporary == pytest.approx(backward - start, rel=0.02)


def test_checkpointing_saves_activations_and_quantisation_weights(on_8: Plan, big: RasaRecipe) -> None:
    whole, saving = on_8.per_gpu("zero2", False), on_8.per_gpu("zero2", True)
    assert saving.activations < whole.activations / 2
    assert saving.weights == whole.weights
    packed = changed(
        big,
        model={"quantization": "4bit"},
        repair={"gradient_checkpointing": True},
        consistency={"gradient_checkpointing": True},
    )
    assert plan(packed, on_8.config, gpus=8)._sizes["repair"].weights < saving.weights / 2


def test_quantised_tensors_are_those_that_quantise_packs() -> None:
    pytest.importorskip("bitsandbytes")
    from trainer.moe.quantised import Packed, quantise

    backbone = Backbone.of(tiny_model("qwen3_moe"))
    made = changed(small_recipe({"full"}), detect={"top_k": 4})
    trained = under_repair(backbone, critical(made, backbone), made.repair)
    saved = measure(trained).weights - measure(trained, "4bit").weights
    assert isinstance(trained, SplitModel)
    quantise(backbone, "4bit", torch.device("cpu"))
    elements = sum(m.shape.numel() for m in backbone.model.modules() if isinstance(m, Packed))
    assert saved == pytest.approx(elements * (4 - 0.5625), abs=100)


def test_engines_split_what_they_say(on_8: Plan) -> None:
    found = {engine: next(m for m in on_8.stages(engine, True) if m.stage == "repair") for engine in ENGINES}
    assert found["single"].weights == found["ddp"].weights == found["zero2"].weights
    assert found["fsdp2"].weights == found["zero3"].weights == pytest.approx(found["ddp"].weights / 8, rel=0.01)
    assert found["zero1"].optimizer == found["zero2"].optimizer == found["ddp"].optimizer // 8
    assert found["zero2"].masters == 4 * on_8.parts.critical // 8
    assert found["zero3"].masters == 0
    assert found["zero3-offload"].total < found["zero3"].total < found["zero2"].total
    # Read by the first process alone, where it will be split; the others hold fp32 critical experts of their own.
    assert on_8.host_memory("ddp") > 8 * 60e9 > on_8.host_memory("zero3") > 60e9 + 8 * 4 * on_8.parts.critical
    assert on_8.host_memory("zero3") > on_8.host_memory("single")


@settings(max_examples=25, deadline=None)
@given(small=st.floats(1, 600), factor=st.floats(1, 10))
def test_more_memory_never_asks_for_a_dearer_engine(on_8: Plan, small: float, factor: float) -> None:
    order = [(e, c) for e in ENGINES for c in (False, True)]
    few, many = on_8.recommend(small), on_8.recommend(small * factor)
    if few is not None:
        assert on_8.fits(few.engine, few.checkpointing, small)
        assert many is not None
        dear = [engine in ("fsdp2", "zero3", "zero3-offload") for engine in (few.engine, many.engine)]
        assert dear[0] >= dear[1] and (many.engine, many.checkpointing) in order


def test_advice_names_what_makes_it_fit(on_8: Plan) -> None:
    assert on_8.recommend(10) is None
    lines = on_8.advice(10)
    assert any("lora_rank=8" in line for line in lines)
    assert "more GPUs" in lines[-1]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    tiny_model().config.save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    tree = changed(small_recipe({"full"}), model={"name_or_path": str(tmp_path / "model")}, detect={"top_k": 4})
    path.write_text(tree.resolved_yaml())
    return path


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", *arguments])
    return int(left.value.code or 0)


def test_command_prints_json_that_adds_up(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(recipe_file), "repair.lora_rank=4", "--gpus", "2", "--gpu-memory", "24", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == {"engine": "ddp", "checkpointing": False}
    for engine in found["engines"].values():
        shown = dict(engine["as_recipe"])
        total, fits, _ = shown.pop("total"), shown.pop("fits"), shown.pop("stage")
        assert sum(shown.values()) == total == max(engine["stages"].values())
        assert fits
    assert found["parameters"]["trainable"]["repair"] < found["parameters"]["critical"]


def test_command_answers_for_common_cards(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(recipe_file), "--gpus", "1") == 0
    out = capsys.readouterr().out
    assert all(f"{size} GB: --engine single" in out for size in (24, 48, 80, 141))


def test_errors_are_one_line(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases = {
        "--gpus=0": "--gpus: found 0",
        f"--gpus={10**21}": f"--gpus: found {10**21}; allowed: 1 to 65,536",
        "--nodes=-1": "--nodes: found -1",
        **{f"--gpu-memory={value}": f"--gpu-memory: found {value}" for value in ("0", "inf", "nan", "-1")},
        "model.name_or_path=nobody/not-there": "model.name_or_path: 'nobody/not-there' is no folder here",
        "model.name_or_path=a/b/c": "model.name_or_path: 'a/b/c' is no folder here",
        "repair.max_length=null": "repair.max_length: found null",
        "detect.top_k=1000": "detect.top_k: 1000 selects",
        "detect.shared_experts=true": "detect.shared_experts: found true, but olmoe has no shared experts",
    }
    for given_, message in cases.items():
        assert command(str(recipe_file), given_) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "recursion"),
        ("[]", "config.json"),
        ('{"num_experts_per_tok": 9}', "num_experts_per_tok: found 9"),
        ('{"num_hidden_layers": 1000000000}', "num_hidden_layers: found 1000000000"),
        ('{"hidden_act": "nope"}', "no model can be built from it: KeyError: 'nope'"),
    ],
)
def test_a_plan_refuses_the_configuration_that_a_run_would_refuse(
    content: str, said: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd").mkdir()
    tree = tiny_model().config.to_dict()
    tree = json.dumps(tree | json.loads(content)) if content.startswith("{") else content
    (tmp_path / "odd/config.json").write_text(tree)
    assert command(str(recipe_file), f"model.name_or_path={tmp_path / 'odd'}") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "config.json" in error and said in error


def test_a_model_without_experts_is_refused() -> None:
    from transformers import Qwen3Config

    with pytest.raises(ValueError, match=r"MoE|expert"):
        plan(small_recipe({"full"}), Qwen3Config(num_hidden_layers=1, dtype="float32"), gpus=1)


def test_the_meter_counts_what_lives() -> None:
    layer = nn.Linear(8, 8, bias=False)
    one = 4 * 8 * 4
    with rehearsal.Meter([layer.weight], {}) as meter:
        kept = layer(torch.ones(4, 8))  # the input is needed for the gradient of the weight
        assert meter.live == 2 * one
        kept = kept + 1
        assert (meter.live, meter.peak) == (2 * one, 3 * one)
        del kept
        assert meter.live == 0
