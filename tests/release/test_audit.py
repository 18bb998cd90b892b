"""What moved is found, from disk; and the checkpoint reads back as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter

from data_prep.errors import UserError
from tests.moe.families import FAMILIES, Family
from tests.mxfp4 import pack
from tests.release.conftest import Repaired, allowed, change
from tests.tiny import tiny_model, tiny_tokenizer, token_ids
from trainer.model.load import read_model
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.footprint import Footprint
from trainer.recipe.sections import ExportSection
from trainer.release.audit import audit_files, reload_check
from trainer.release.export import export_checkpoint, save_checkpoint
from trainer.release.places import Places

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_audit_names_the_very_expert_that_moved_in_every_family(family: Family, tmp_path: Path) -> None:
    model = family.build()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base", ExportSection(max_shard_size="20KB"))
    backbone = Backbone.of(model)
    pairs = [(backbone.layers[0].index, 5), (backbone.layers[-1].index, 2)]
    experts = change(model, pairs)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model", ExportSection(max_shard_size="30KB"))
    audit = audit_files(tmp_path / "base", tmp_path / "model", allowed(model, experts))
    assert (audit["compared"], audit["untouched_identical"], audit["not_exported"]) == ("files", True, [])
    assert (audit["experts_changed"], audit["experts_total"]) == (2, backbone.total_experts)
    assert audit["gate_weights_changed"] == 1.0
    # The same files seen with one of the two experts swapped for its neighbour: exactly that one is outside.
    for wrong in ((pairs[0][0], 6), (pairs[1][0], 3)):
        kept = next(pair for pair in pairs if pair[0] != wrong[0])
        members = (Member(*kept), Member(*wrong))
        others = allowed(model, ExpertSet(members, experts.experts_per_layer))
        found = audit_files(tmp_path / "base", tmp_path / "model", others)
        assert found["moved_outside"] and all(f".{wrong[0]}." in name for name in found["moved_outside"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.down_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_one_changed_number_outside_the_set_is_found_and_named(name: str, found: str, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    experts = change(model, [(0, 1)])
    parameter = model.get_parameter(name).data.view(-1)
    parameter[3] = torch.nextafter(parameter[3], torch.tensor(torch.inf))
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_files(tmp_path / "base", tmp_path / "model", allowed(model, experts))
    assert (audit["untouched_identical"], audit["moved_outside"]) == (False, [found])


def test_a_tensor_that_went_missing_is_found_and_named(repaired: Repaired) -> None:
    base, exported, footprint = repaired()
    tensors = load_file(exported / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    audit = audit_files(base, exported, footprint)
    assert audit["moved_outside"] == ["model.layers.1.self_attn.q_proj.weight"]
    assert audit["not_exported"] == []


def test_tensors_that_the_model_class_does_not_load_are_named_but_did_not_move(repaired: Repaired) -> None:
    base, exported, footprint = repaired()
    tensors = load_file(base / "model.safetensors") | {"mtp.proj.weight": torch.ones(3)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    audit = audit_files(base, exported, footprint)
    assert (audit["untouched_identical"], audit["not_exported"]) == (True, ["mtp.proj.weight"])


def test_full_fine_tuning_has_no_outside(repaired: Repaired) -> None:
    base, exported, _ = repaired()
    audit = audit_files(base, exported, Footprint.everything(tiny_model()))
    assert (audit["untouched_identical"], audit["moved_outside"], audit["experts_changed"]) == (None, [], 2)


def test_a_checkpoint_in_another_type_than_its_base_has_moved(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    experts = change(model, [(0, 1)])
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_files(tmp_path / "base", tmp_path / "model", allowed(model, experts))
    assert audit["untouched_identical"] is False
    assert len(audit["moved_outside"]) == len(load_file(tmp_path / "base/model.safetensors"))
    # As a run exports it: in the base's types, where the recipe asked for another one to train in.
    export_checkpoint(model, tmp_path / "base", tmp_path / "exported")
    audit = audit_files(tmp_path / "base", tmp_path / "exported", allowed(model, experts))
    assert (audit["untouched_identical"], audit["experts_changed"], audit["files_differ"]) == (True, 1, [])


@pytest.mark.parametrize("moved", [False, True])
def test_a_base_in_an_older_format_is_compared_as_a_loaded_model(moved: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    # The format transformers holds in memory also loads, and names the experts otherwise than the Hub's does.
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    experts = change(model, [(0, 1), (2, 7)])
    if moved:
        model.get_parameter("model.norm.weight").data[0] += 1
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_files(tmp_path / "base", tmp_path / "model", allowed(model, experts))
    assert (audit["compared"], audit["experts_changed"], audit["experts_total"]) == ("models", 2, 24)
    assert audit["moved_outside"] == (["model.norm.weight"] if moved else [])


# --- the footprint --------------------------------------------------------------------------------


@torch.no_grad()
def moved(tmp_path: Path, model: PreTrainedModel, *names: str, row: int | None = None, older: bool = False) -> None:
    """Write `base` and `model`, between which these parameters (or one row of them) moved."""
    model.save_pretrained(tmp_path / "base", save_original_format=not older)
    for name in names:
        parameter = model.get_parameter(name)
        parameter[slice(None) if row is None else row] += 0.1
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")


def test_a_router_that_moved_is_found_where_no_stage_may_train_it(repaired: Repaired) -> None:
    base, exported, footprint = repaired()
    routers = [name for name in footprint if ".gate." in name]
    experts = Footprint({name: rows for name, rows in footprint.rows.items() if name not in routers})
    audit = audit_files(base, exported, experts)
    assert (audit["untouched_identical"], audit["moved_outside"]) == (False, routers)
    assert (audit["gate_weights_changed"], audit["experts_changed"]) == (1.0, 2)


@pytest.mark.parametrize("older", [False, True], ids=["files", "models"])
def test_an_attention_output_moves_where_it_may_and_nowhere_else(older: bool, tmp_path: Path) -> None:
    model = tiny_model()
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 2)]
    moved(tmp_path, model, *names, older=older)
    audit = audit_files(tmp_path / "base", tmp_path / "model", Footprint.of(names))
    assert (audit["compared"], audit["untouched_identical"]) == ("models" if older else "files", True)
    assert (audit["tensors_changed"], audit["experts_changed"], audit["gate_weights_changed"]) == (2, 0, 0.0)
    assert audit["footprint"] == {"tensors": 2, "parameters": 2 * 32 * 32, "of": model.num_parameters()}
    audit = audit_files(tmp_path / "base", tmp_path / "model", Footprint.of(names[:1]))
    assert (audit["untouched_identical"], audit["moved_outside"]) == (False, names[1:])


@pytest.mark.parametrize(("row", "identical"), [(5, True), (6, False)])
def test_a_row_that_moved_is_found_outside_those_that_may(row: int, identical: bool, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    moved(tmp_path, tiny_model(), name, row=row)
    audit = audit_files(tmp_path / "base", tmp_path / "model", Footprint({name: frozenset({5, 9})}))
    assert (audit["untouched_identical"], audit["moved_outside"]) == (identical, [] if identical else [name])


def test_nothing_is_claimed_only_where_every_parameter_may_move(repaired: Repaired) -> None:
    base, exported, _ = repaired("gpt_oss")
    model = tiny_model("gpt_oss")
    everything = Footprint.everything(model)
    in_rows = Footprint({name: frozenset(range(len(tensor))) for name, tensor in model.named_parameters()})
    for footprint in (everything, in_rows):
        assert audit_files(base, exported, footprint)["untouched_identical"] is None
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.down_proj"):
        rest = Footprint({other: rows for other, rows in everything.rows.items() if other != name})
        assert audit_files(base, exported, rest)["untouched_identical"] is True


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_may_move_under_either_name(name: str, tmp_path: Path) -> None:
    config = tiny_model().config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    moved(tmp_path, model, name)
    audit = audit_files(tmp_path / "base", tmp_path / "model", Footprint.of([name]))
    assert (audit["untouched_identical"], audit["tensors_changed"]) == (True, 1)
    assert audit["footprint"] == {"tensors": 1, "parameters": 64 * 32, "of": model.num_parameters()}
    # Files that hold both, with values of their own: each may move under its own name alone.
    for folder in ("base", "model"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    audit = audit_files(tmp_path / "base", tmp_path / "model", Footprint.of([name]))
    assert audit["moved_outside"] == sorted({"model.embed_tokens.weight", "lm_head.weight"} - {name})


def test_a_tensor_that_packs_several_parameters_may_move_where_all_of_them_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = "model.layers.0.self_attn.qkv.weight"
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    rule = WeightConverter(["self_attn.qkv.weight"], parts, [Chunk(0)])
    monkeypatch.setattr("trainer.release.places.get_model_conversion_mapping", lambda model: [rule])
    places = Places(tiny_model(), [packed])
    names = [f"model.layers.0.{part}" for part in parts]
    assert places.of[packed].targets == tuple(names)
    assert places.footprint(Footprint.of(names)).rows == {packed: None}
    for left_out in names:
        rest = Footprint.of(name for name in names if name != left_out)
        assert not places.footprint(rest).rows
        assert not places.footprint(rest | Footprint({left_out: frozenset({0})})).rows


# --- reading it back ------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
def test_a_base_in_mxfp4_is_compared_with_the_plain_tensors_it_stands_for(moved: bool, tmp_path: Path) -> None:
    save_checkpoint(tiny_model("gpt_oss"), tiny_tokenizer(), tmp_path / "base")
    pack(tmp_path / "base")
    model = read_model(tmp_path / "base", "auto")
    experts = change(model, [(0, 1), (2, 7)])
    if moved:
        model.model.norm.weight.data[0] += 1
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported")
    audit = audit_files(tmp_path / "base", tmp_path / "exported", allowed(model, experts))
    assert (audit["compared"], audit["experts_changed"]) == ("models", 2)
    assert audit["moved_outside"] == (["model.norm.weight"] if moved else [])
    assert reloaded(model, tmp_path / "exported", model(token_ids()).logits)["reload_ok"]


def test_a_base_may_name_a_class_that_transformers_calls_otherwise(repaired: Repaired) -> None:
    """Phi-3.5-MoE's configuration says PhiMoEForCausalLM."""
    base, exported, footprint = repaired("olmoe")
    for folder in (base, exported):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OLMoeForCausalLM"]}))
    assert audit_files(base, exported, footprint)["untouched_identical"]
    assert isinstance(read_model(base, "auto"), OlmoeForCausalLM)


def reloaded(model: PreTrainedModel, folder: Path, logits: torch.Tensor) -> dict[str, object]:
    return reload_check(folder, logits, token_ids(), dtype=model.dtype, device=CPU)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_checkpoint_reloads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    change(model, [(0, 1)])
    logits = model(token_ids()).logits
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(token_ids()).logits, logits)
    found = reloaded(model, tmp_path / "model", logits)
    assert (found["reload_max_logit_difference"], found["reload_difference"], found["reload_ok"]) == (0.0, 0.0, True)
    assert found["not_as_trained"] is None and found["reload_tokens"] == 30


def test_a_checkpoint_whose_critical_experts_are_zeroed_fails_the_reload_check(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    experts = change(model, [(0, 1), (2, 7)])
    logits = model(token_ids()).logits
    for layer, chosen in experts.by_layer().items():
        for tensor in Backbone.of(model).layer(layer).experts.parameters():
            tensor.data[chosen] = 0
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    assert reloaded(model, tmp_path / "model", logits)["reload_ok"] is False


def test_pickled_weights_are_not_read(repaired: Repaired) -> None:
    base, exported, footprint = repaired()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found pytorch_model.bin; expected model.safetensors"):
        audit_files(base, exported, footprint)
