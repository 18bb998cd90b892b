"""The exported checkpoint and its audit: what moved is found, from disk."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer, token_ids
from trainer.export import audit_checkpoint, save_checkpoint
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel


def repaired(family: str, folder: Path) -> tuple[PreTrainedModel, ExpertSet]:
    """A tiny model with two experts and all routers changed, saved to `folder`."""
    backbone = Backbone.of(tiny_model(family)).check()
    experts = ExpertSet((Member(0, 1), Member(2, 7)), {layer.index: layer.num_experts for layer in backbone})
    split = SplitModel(backbone, experts)
    for parameter in [*split.trainable().values(), *backbone.router_parameters().values()]:
        parameter.data += 0.1
    split.fuse()
    save_checkpoint(split.model, tiny_tokenizer(), folder)
    return split.model, experts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_reloads_to_the_same_logits_and_names_what_moved(family: str, tmp_path: Path) -> None:
    model, experts = repaired(family, tmp_path / "model")
    logits = model(token_ids()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(token_ids()).logits, logits)
    audit = audit_checkpoint(tiny_model(family), tmp_path / "model", experts, logits, token_ids())
    assert audit["untouched_identical"] and audit["reload_ok"]
    assert (audit["experts_changed"], audit["experts_total"], audit["gate_weights_changed"]) == (2, 24, 1.0)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj", "model.norm.weight"]
)
def test_one_changed_number_outside_the_set_is_found_and_named(name: str, tmp_path: Path) -> None:
    model, experts = repaired("olmoe", tmp_path / "first")
    model.get_parameter(name).data.view(-1)[3] += 1e-4
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    logits = model(token_ids()).logits
    audit = audit_checkpoint(tiny_model("olmoe"), tmp_path / "model", experts, logits, token_ids())
    assert audit["untouched_identical"] is False
    assert audit["moved_outside"] == [name]


def test_a_checkpoint_whose_critical_experts_are_zeroed_fails_the_reload_check(tmp_path: Path) -> None:
    model, experts = repaired("olmoe", tmp_path / "model")
    logits = model(token_ids()).logits
    for layer, chosen in experts.by_layer().items():
        for tensor in Backbone.of(model).layer(layer).experts.parameters():
            tensor.data[chosen] = 0
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    audit = audit_checkpoint(tiny_model("olmoe"), tmp_path / "model", experts, logits, token_ids())
    assert audit["reload_ok"] is False


def test_a_failed_write_leaves_the_checkpoint_before_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = repaired("olmoe", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "model.partial").exists()
