"""The exported checkpoint and its audit: what moved is found, from disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeForCausalLM, PreTrainedModel

from data_prep.errors import UserError
from tests.moe.families import FAMILIES, Family
from tests.mxfp4 import pack
from tests.release.conftest import Repaired, change
from tests.tiny import tiny_model, tiny_tokenizer, token_ids
from trainer.model.load import read_model
from trainer.model.weight_files import CheckpointFiles
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.release.export import audit_files, reload_check, save_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_audit_names_the_very_expert_that_moved_in_every_family(family: Family, tmp_path: Path) -> None:
    model = family.build()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base", max_shard_size="20KB")
    backbone = Backbone.of(model)
    pairs = [(backbone.layers[0].index, 5), (backbone.layers[-1].index, 2)]
    experts = change(model, pairs)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model", max_shard_size="30KB")
    audit = audit_files(tmp_path / "base", tmp_path / "model", experts)
    assert (audit["compared"], audit["untouched_identical"], audit["not_exported"]) == ("files", True, [])
    assert (audit["experts_changed"], audit["experts_total"]) == (2, backbone.total_experts)
    assert audit["gate_weights_changed"] == 1.0
    # The same files seen with one of the two experts swapped for its neighbour: exactly that one is outside.
    for wrong in ((pairs[0][0], 6), (pairs[1][0], 3)):
        kept = next(pair for pair in pairs if pair[0] != wrong[0])
        members = (Member(*kept), Member(*wrong))
        found = audit_files(tmp_path / "base", tmp_path / "model", ExpertSet(members, experts.experts_per_layer))
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
    audit = audit_files(tmp_path / "base", tmp_path / "model", experts)
    assert (audit["untouched_identical"], audit["moved_outside"]) == (False, [found])


def test_a_tensor_that_went_missing_is_found_and_named(repaired: Repaired) -> None:
    base, exported, experts = repaired()
    tensors = load_file(exported / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    audit = audit_files(base, exported, experts)
    assert audit["moved_outside"] == ["model.layers.1.self_attn.q_proj.weight"]
    assert audit["not_exported"] == []


def test_tensors_that_the_model_class_does_not_load_are_named_but_did_not_move(repaired: Repaired) -> None:
    base, exported, experts = repaired()
    tensors = load_file(base / "model.safetensors") | {"mtp.proj.weight": torch.ones(3)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    audit = audit_files(base, exported, experts)
    assert (audit["untouched_identical"], audit["not_exported"]) == (True, ["mtp.proj.weight"])


def test_full_fine_tuning_has_no_outside(repaired: Repaired) -> None:
    base, exported, _ = repaired()
    audit = audit_files(base, exported, None)
    assert (audit["untouched_identical"], audit["moved_outside"], audit["experts_changed"]) == (None, [], 2)


def test_a_base_stored_in_another_type_is_cast_first_and_the_audit_says_so(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    experts = change(model, [(0, 1)])
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_files(tmp_path / "base", tmp_path / "model", experts)
    assert (audit["untouched_identical"], audit["base_cast_to"]) == (True, "float32")
    assert audit["experts_changed"] == 1


@pytest.mark.parametrize("moved", [False, True])
def test_a_base_in_an_older_format_is_compared_as_a_loaded_model(moved: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    # The format transformers holds in memory also loads, and names the experts otherwise than the Hub's does.
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    experts = change(model, [(0, 1), (2, 7)])
    if moved:
        model.get_parameter("model.norm.weight").data[0] += 1
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_files(tmp_path / "base", tmp_path / "model", experts)
    assert (audit["compared"], audit["experts_changed"], audit["experts_total"]) == ("models", 2, 24)
    assert audit["moved_outside"] == (["model.norm.weight"] if moved else [])


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
    audit = audit_files(tmp_path / "base", tmp_path / "exported", experts)
    assert (audit["compared"], audit["experts_changed"]) == ("models", 2)
    assert audit["moved_outside"] == (["model.norm.weight"] if moved else [])
    assert reloaded(model, tmp_path / "exported", model(token_ids()).logits)["reload_ok"]


def test_a_base_may_name_a_class_that_transformers_calls_otherwise(repaired: Repaired) -> None:
    """Phi-3.5-MoE's configuration says PhiMoEForCausalLM."""
    base, exported, experts = repaired("olmoe")
    for folder in (base, exported):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OLMoeForCausalLM"]}))
    assert audit_files(base, exported, experts)["untouched_identical"]
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
    assert found == {"reload_max_logit_difference": 0.0, "reload_ok": True}


def test_a_checkpoint_whose_critical_experts_are_zeroed_fails_the_reload_check(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    experts = change(model, [(0, 1), (2, 7)])
    logits = model(token_ids()).logits
    for layer, chosen in experts.by_layer().items():
        for tensor in Backbone.of(model).layer(layer).experts.parameters():
            tensor.data[chosen] = 0
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    assert reloaded(model, tmp_path / "model", logits)["reload_ok"] is False


# --- writing --------------------------------------------------------------------------------------


def test_gathered_weights_are_written_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "whole")
    for parameter in model.parameters():
        parameter.data.zero_()  # as good as a rank's own part
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "gathered", state_dict=gathered)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "gathered")]
    assert files[0] == files[1]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_weights_are_those_that_transformers_would_write(family: Family, tmp_path: Path) -> None:
    model = family.build()
    model.save_pretrained(tmp_path / "theirs")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "shards", max_shard_size="60KB")
    with CheckpointFiles(tmp_path / "ours") as whole, CheckpointFiles(tmp_path / "shards") as shards:
        assert whole.file_of.keys() == shards.file_of.keys() and shards.index is not None
        tensors = {name: shards.tensor(name) for name in shards.file_of}
        assert all(torch.equal(whole.tensor(name), tensor) for name, tensor in tensors.items())
        assert shards.index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    largest = max(60_000, *(tensor.nbytes for tensor in tensors.values()))
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < largest + 10_000  # a file begins with a header


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_written_once(tied: bool, tmp_path: Path) -> None:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    with CheckpointFiles(tmp_path / "model") as files:
        assert ("lm_head.weight" in files.file_of) is not tied
    # A base that was written with both copies holds nothing that moved.
    shutil.copytree(tmp_path / "model", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    audit = audit_files(tmp_path / "base", tmp_path / "model", change(model, [(0, 1)]))
    assert (audit["moved_outside"], audit["not_exported"]) == ([], ["lm_head.weight"] if tied else [])


def test_a_large_checkpoint_is_cut_into_shards(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "model", max_shard_size="50KB")
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3 and sorted(set(index["weight_map"].values())) == shards


def test_a_failed_write_leaves_the_checkpoint_before_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "model.partial").exists()


def test_pickled_weights_are_not_read(repaired: Repaired) -> None:
    base, exported, experts = repaired()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found pytorch_model.bin; expected model.safetensors"):
        audit_files(base, exported, experts)


PEAK = """
import sys, threading, time, pathlib, torch, psutil
from transformers import OlmoeConfig, OlmoeForCausalLM
from tests.tiny import tiny_tokenizer
from trainer.release.export import audit_files, save_checkpoint
from trainer.model.load import read_model
from trainer.moe.backbone import Backbone
folder = pathlib.Path(sys.argv[1])
config = OlmoeConfig(hidden_size=256, intermediate_size=512, num_experts=24, num_hidden_layers=8, vocab_size=512,
                     num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=1)
model = OlmoeForCausalLM(config)
tokenizer = tiny_tokenizer()
save_checkpoint(model, tokenizer, folder / "small", max_shard_size="50MB")  # what the libraries load on first use
def used(): return psutil.Process().memory_info().rss
def peak_of(task):
    peak, done = [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], used()); time.sleep(0.002)
    start = used(); thread = threading.Thread(target=watch); thread.start()
    task(); done.append(True); thread.join()
    return peak[0] - start
print(sum(p.numel() for p in model.parameters()) * 4)
print(peak_of(lambda: save_checkpoint(model, tokenizer, folder / "model", max_shard_size="50MB")))
del model
print(peak_of(lambda: audit_files(folder / "small", folder / "model", None)))
"""


@pytest.mark.slow
def test_writing_holds_one_shard_and_the_audit_no_model(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True)
    size, writing, audit = (int(line) for line in done.stdout.splitlines()[-3:])
    shard = max(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    print(
        f"model {size / 2**20:.0f} MB, shard {shard / 2**20:.0f} MB; more memory than the model's: writing "
        f"{writing / 2**20:.0f} MB, audit {audit / 2**20:.0f} MB"
    )
    assert size > 280 * 2**20
    assert writing < 1.3 * shard
    assert audit < 0.25 * size
