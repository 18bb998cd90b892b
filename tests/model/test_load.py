"""What may be loaded, and as what: safetensors, transformers' own code, plain tensors."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from data_prep.schema import Conversation
from tests.moe.families import FAMILIES, Family
from tests.mxfp4 import pack
from tests.tiny import tiny_model, tiny_tokenizer, token_ids
from trainer.evaluation.generation import reply
from trainer.model.chat import Chat
from trainer.model.load import hollow, load, read_model
from trainer.moe.backbone import Backbone
from trainer.recipe.sections import ModelSection


def section(folder: Path, **keys: str) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), **keys})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny olmoe checkpoint with its tokenizer."""
    return saved("olmoe", tmp_path / "model")


def saved(family: str, folder: Path) -> Path:
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_checkpoint_of_pickled_weights_is_refused_unopened(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    bomb = checkpoint / "pytorch_model.bin"
    bomb.write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "ran")}))
    with pytest.raises(UserError, match=r"holds pytorch_model.bin and no model.safetensors; pickled") as refused:
        load(section(checkpoint))
    assert "\n" not in str(refused.value) and not (tmp_path / "ran").exists()
    pickle.loads(bomb.read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run code"


def test_pickled_weights_beside_safetensors_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "ran")}))
    model, _ = load(section(checkpoint))
    assert torch.equal(model(token_ids()).logits, tiny_model()(token_ids()).logits)
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_checkpoint_does_not_run_by_default(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "foreign.ForeignConfig",
        "AutoModelForCausalLM": "foreign.ForeignModel",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "foreign.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    model, _ = load(section(checkpoint))
    assert type(model).__name__ == "OlmoeForCausalLM" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.vision is not None], ids=lambda f: f.model_type)
def test_a_model_with_a_vision_tower_is_loaded_with_it(family, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    family.build().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = load(section(tmp_path / "model"))
    assert type(model).__name__ == family.architecture
    assert any("visual" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_hollow_model_is_the_same_once_it_is_filled(family: Family, tmp_path: Path) -> None:
    """As other processes hold it where rank 0 alone reads: names, types, tied weights, scoring."""
    built = family.build()
    for parameter in built.parameters():
        parameter.data = parameter.data.bfloat16()
    built.save_pretrained(tmp_path / "model")
    real = read_model(tmp_path / "model", "auto")
    held = [*real.named_parameters(), *real.named_buffers()]
    found = hollow(section(tmp_path / "model"), {name: tensor.dtype for name, tensor in held})
    with torch.no_grad():
        for (name, tensor), (own_name, own) in zip(
            held, (*found.named_parameters(), *found.named_buffers()), strict=True
        ):
            assert (name, tensor.shape, tensor.dtype) == (own_name, own.shape, own.dtype)
            own.copy_(tensor)
    assert torch.equal(found(token_ids()).logits, real(token_ids()).logits)
    checked, own_backbone = Backbone.of(real).check(), Backbone.of(found)
    own_backbone.adopt([layer.scoring for layer in checked])
    logits_TE, index_TK = torch.randn(3, 8), torch.tensor([[0, 1], [2, 3], [4, 5]])
    for mine, theirs in zip(own_backbone, checked, strict=True):
        assert mine.scoring is not None and theirs.scoring is not None
        assert torch.equal(mine.scoring.weights(logits_TE, index_TK), theirs.scoring.weights(logits_TE, index_TK))
        assert mine.scoring.factor_E is None or mine.scoring.factor_E is not theirs.scoring.factor_E


def test_a_model_to_be_quantised_comes_whole_and_on_the_cpu(checkpoint: Path) -> None:
    model, _ = load(section(checkpoint, quantization="4bit"), torch.device("meta"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_a_checkpoint_in_mxfp4_is_loaded_as_plain_tensors(tmp_path: Path) -> None:
    folder = saved("gpt_oss", tmp_path / "model")
    wanted = pack(folder)
    model, _ = load(section(folder))
    found = Backbone.of(model).check().expert_parameters()
    for name, values in wanted.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), values, atol=0, rtol=0)
    # What the Trainer and an export ask; a packed model can neither be trained nor written.
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")


def test_weights_in_another_packed_format_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is stored quantised \(gptq\); allowed: an unquantised checkpoint"):
        load(section(checkpoint))


def test_a_base_that_asks_for_router_logits_generates_and_trains_as_without(checkpoint: Path) -> None:
    plain, tokenizer = load(section(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    asks, _ = load(section(checkpoint))
    prompts = [Conversation.of(text) for text in ("w1 w2", "w3", "w4 w5 w6")]
    said = [
        reply(
            model, Chat.of(model, tokenizer, section(checkpoint)), prompts, max_new_tokens=5, batch_size=2, label="x"
        )
        for model in (plain, asks)
    ]
    assert said[0] == said[1]
    ids = token_ids()
    losses = [model(ids, labels=ids) for model in (plain, asks)]
    assert torch.equal(losses[0].loss, losses[1].loss), "no load-balancing loss is added"
    assert asks.config.output_router_logits is True, "the config is exported as it was"
    held = {name: tensor.dtype for name, tensor in (*asks.named_parameters(), *asks.named_buffers())}
    other = hollow(section(checkpoint), held)
    assert len(other._forward_pre_hooks) == len(asks._forward_pre_hooks) == 1
    assert not plain._forward_pre_hooks
