"""A model whose frozen weights are packed: what trains, what it costs, and that a checkpoint keeps the base's bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized

from tests.moe.families import FAMILIES as EVERY_FAMILY
from tests.moe.families import Family
from tests.tiny import FAMILIES, NUM_EXPERTS, tiny_model, tiny_tokenizer, token_ids
from trainer.moe.backbone import Backbone, expert_tensor_names
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.moe.footprint import Footprint
from trainer.moe.quantised import Kind, Packed, fuse_into, is_quantised, quantise
from trainer.release.audit import audit_files
from trainer.release.export import save_checkpoint

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("4bit", "8bit")
ERROR = {"4bit": 0.12, "8bit": 0.015}  # relative, of normal weights; measured .093 and .011
BYTES = {"4bit": 0.57, "8bit": 1.02}  # per weight, with the scale of every block of 64 or 256
CHOSEN = ((0, 1), (0, 5), (2, 3))


def split_model(family: str, lora_rank: int | None = None) -> SplitModel:
    return split_of(Backbone.of(tiny_model(family)).check(), CHOSEN, lora_rank)


def split_of(backbone: Backbone, chosen: tuple[tuple[int, int], ...], lora_rank: int | None = None) -> SplitModel:
    sizes = {layer.index: layer.num_experts for layer in backbone}
    torch.manual_seed(0)  # LoRA starts from drawn weights
    experts, shared = ExpertSet(tuple(Member(*pair) for pair in chosen), sizes), backbone.shared_layers
    return SplitModel(backbone, experts.with_shared(shared) if shared else experts, lora_rank=lora_rank)


def packed(family: str, kind: Kind, lora_rank: int | None = None) -> SplitModel:
    split = split_model(family, lora_rank)
    quantise(split.backbone, kind, CPU)
    return split


def packed_modules(split: SplitModel) -> dict[str, Any]:
    return {name: module for name, module in split.model.named_modules() if is_parametrized(module)}


def rounded(family: str, kind: Kind, lora_rank: int | None = None) -> tuple[SplitModel, SplitModel]:
    """A packed model, and an ordinary one whose frozen weights are what the packed ones read as."""
    quantised, plain = packed(family, kind, lora_rank), split_model(family, lora_rank)
    modules = dict(plain.model.named_modules())
    for name, module in packed_modules(quantised).items():
        for tensor in module.parametrizations:
            getattr(modules[name], tensor).data = getattr(module, tensor).clone()
    return quantised, plain


def train(split: SplitModel, steps: int = 3) -> None:
    split.train_experts(routers=True)
    parameters = [p for p in split.model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    ids = token_ids(rows=16)  # enough tokens to reach every critical expert
    for _ in range(steps):
        split.model(ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_linear_layers_are_packed_and_nothing_else(family: str, kind: Kind) -> None:
    plain, split = split_model(family), packed(family, kind)
    wanted = {f"model.layers.{i}.self_attn.{name}_proj": {"weight"} for i in range(3) for name in "qkvo"}
    wanted |= {layer.experts_name: {"gate_up_proj", "down_proj"} for layer in split.backbone}
    found = packed_modules(split)
    assert {name: set(module.parametrizations) for name, module in found.items()} == wanted
    before = dict(plain.model.named_modules())
    for name, module in found.items():
        for tensor in wanted[name]:
            original, read = getattr(before[name], tensor), getattr(module, tensor)
            held = module.parametrizations[tensor]
            assert read.shape == original.shape and read.dtype == original.dtype
            assert 0 < (read - original).norm() / original.norm() < ERROR[kind]
            (state,) = (part.state for part in held if isinstance(part, Packed))
            assert held.original.nbytes + state.absmax.nbytes <= BYTES[kind] * original.numel() + 8


@pytest.mark.parametrize("kind", KINDS)
def test_critical_experts_are_copies_of_the_unquantised_ones(kind: Kind) -> None:
    wanted, split = split_model("olmoe").state_dict(), packed("olmoe", kind)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in split.state_dict().items())
    experts: Any = split.backbone.layer(0).experts
    assert not torch.equal(experts.down_proj[[1, 5]], experts.critical.down_proj), "packing loses something"


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_a_model_with_the_rounded_weights(family: str, kind: Kind, lora_rank: int | None) -> None:
    quantised, plain = rounded(family, kind, lora_rank)
    torch.testing.assert_close(quantised.model(token_ids()).logits, plain.model(token_ids()).logits)
    with quantised.original() as rounded_base, plain.original() as base:
        torch.testing.assert_close(rounded_base.model(token_ids()).logits, base.model(token_ids()).logits)
    frozen = {n: p.clone() for n, p in quantised.model.named_parameters() if n.endswith(".original")}
    quantised.model.gradient_checkpointing_enable({"use_reentrant": False})
    start = quantised.state_dict()
    for split in (quantised, plain):
        split.model.train()
        train(split)
    ours, theirs = quantised.state_dict(), plain.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)
    assert all(not torch.equal(start[n], ours[n]) for n in quantised.trainable() if not n.endswith("_bias"))
    assert all(torch.equal(p, frozen[n]) for n, p in quantised.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_keeps_no_dequantised_experts_for_the_backward_pass(checkpointing: bool) -> None:
    split = packed("olmoe", "4bit")
    split.train_experts()
    split.model.train()
    if checkpointing:
        split.model.gradient_checkpointing_enable({"use_reentrant": False})
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        split.model(token_ids(), labels=token_ids())
    fused = [shape for shape in kept if len(shape) == 3 and shape[0] == NUM_EXPERTS]
    assert bool(fused) is not checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tensor_is_dequantised_once_per_forward_and_let_go_after_it(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = packed("olmoe", "4bit")
    split.train_experts()
    split.model.train()
    if checkpointing:
        split.model.gradient_checkpointing_enable({"use_reentrant": False})
    reads, forward = [], Packed.forward

    def counted(self: Packed, tensor: Tensor) -> Tensor:
        reads.append(id(self))
        return forward(self, tensor)

    monkeypatch.setattr(Packed, "forward", counted)
    loss = split.model(token_ids(), labels=token_ids()).loss
    assert len(reads) == len(set(reads)) == 3 * (4 + 2)
    loss.backward()
    experts = split.backbone.layer(0).experts
    assert experts.down_proj is not experts.down_proj, "the cache of the recomputed forward was left open"


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_holds_the_bases_own_bits_and_what_was_trained(
    family: str, lora_rank: int | None, tmp_path: Path
) -> None:
    save_checkpoint(tiny_model(family), tiny_tokenizer(), tmp_path / "base")
    split = packed(family, "4bit", lora_rank)
    train(split)
    repaired = fuse_into(Backbone.of(tiny_model(family)), split)
    assert not is_quantised(repaired)
    save_checkpoint(repaired, tiny_tokenizer(), tmp_path / "repaired")
    stock = Backbone.of(repaired)
    footprint = Footprint.of_experts(stock, split.expert_set) | Footprint.of_routers(stock)
    audit = audit_files(tmp_path / "base", tmp_path / "repaired", footprint)
    assert audit["untouched_identical"] and audit["experts_changed"] == len(CHOSEN)
    if lora_rank is None:
        backbone = Backbone.of(repaired)
        for index, experts in split.expert_set.by_layer().items():
            critical: Any = split.backbone.layer(index).experts.critical
            fused = backbone.layer(index).experts
            for name in expert_tensor_names(fused):
                assert torch.equal(getattr(fused, name)[experts], critical.fused_weights(name))
    routers, trained = Backbone.of(repaired).router_parameters(), split.state_dict()
    assert all(torch.equal(parameter, trained[name]) for name, parameter in routers.items())


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.model_type)
def test_every_family_trains_packed_and_is_fused_into_its_own_bits(family: Family) -> None:
    model = family.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = Backbone.of(model).check()
    layer = backbone.layers[-1]
    split = split_of(backbone, ((layer.index, 1), (layer.index, 2)))
    quantise(backbone, "4bit", CPU)
    gates = {id(inner) for at in backbone for inner in at.router.modules()}
    found = packed_modules(split)
    assert {at.experts_name for at in backbone} <= found.keys()
    assert not any(
        id(module) in gates or min(getattr(module, "weight", Tensor(2, 2)).shape) == 1 for module in found.values()
    )
    assert not any(name.startswith(("lm_head", "model.visual")) or ".critical" in name for name in found)
    shared = layer.shared_parameters()
    for at in backbone:
        if at.shared_name is not None:
            assert any(name.startswith(at.shared_name) for name in found) is (at is not layer)
    train(split, steps=1)
    after = fuse_into(Backbone.of(family.build()), split).state_dict()
    experts = {f"{layer.experts_name}.{n}" for n in expert_tensor_names(layer.experts)}
    may_move = experts | set(backbone.router_parameters()) | set(shared)
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= may_move and moved >= {f"{layer.experts_name}.down_proj", *shared}
    rest = [e for e in range(layer.num_experts) if e not in (1, 2)]
    assert all(torch.equal(before[name][rest], after[name][rest]) for name in moved & experts)


def _again(split: SplitModel) -> None:
    quantise(split.backbone, "8bit", CPU)


def _as_base(split: SplitModel) -> None:
    fuse_into(split.backbone, split)


@pytest.mark.parametrize(
    ("act", "says"),
    [(_again, "quantised already"), (_as_base, "the base is quantised")],
)
def test_what_would_lose_weights_is_refused(act: Callable[[SplitModel], None], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        act(packed("olmoe", "4bit"))
