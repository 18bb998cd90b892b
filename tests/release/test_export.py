"""The exported checkpoint: written as transformers would write it, whole or not at all, shard by shard."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.moe.families import FAMILIES, Family
from tests.release.conftest import allowed, change
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.model.weight_files import CheckpointFiles
from trainer.recipe.sections import ExportSection
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_weights_are_those_that_transformers_would_write(family: Family, tmp_path: Path) -> None:
    model = family.build()
    model.save_pretrained(tmp_path / "theirs")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "ours")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "shards", ExportSection(max_shard_size="60KB"))
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
    footprint = allowed(model, change(model, [(0, 1)]))
    audit = audit_files(tmp_path / "base", tmp_path / "model", footprint)
    assert (audit["moved_outside"], audit["not_exported"]) == ([], ["lm_head.weight"] if tied else [])


def test_a_large_checkpoint_is_cut_into_shards(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "model", ExportSection(max_shard_size="50KB"))
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


PEAK = """
import sys, threading, time, pathlib, torch, psutil
from transformers import OlmoeConfig, OlmoeForCausalLM
from tests.tiny import tiny_tokenizer
from trainer.recipe.sections import ExportSection
from trainer.moe.footprint import Footprint
from trainer.release.audit import audit_files
from trainer.release.export import export_checkpoint, save_checkpoint
folder = pathlib.Path(sys.argv[1])
config = OlmoeConfig(hidden_size=256, intermediate_size=512, num_experts=24, num_hidden_layers=8, vocab_size=512,
                     num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=1)
model = OlmoeForCausalLM(config)
tokenizer, small = tiny_tokenizer(), ExportSection(max_shard_size="50MB")
save_checkpoint(model, tokenizer, folder / "small", small)  # what the libraries load on first use
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
with torch.no_grad(): model.model.layers[3].mlp.experts.down_proj[5] += 1
print(peak_of(lambda: export_checkpoint(model, folder / "small", folder / "model")))
everything = Footprint.everything(model)
del model
print(peak_of(lambda: audit_files(folder / "small", folder / "model", everything)))
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
