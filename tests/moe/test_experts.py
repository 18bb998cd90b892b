"""Splitting critical experts out, training them, running the original, fusing back."""

import copy

import pytest
import torch

from tests.tiny import FAMILIES, tiny_model, token_ids
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel

CHOSEN = ((0, 1), (0, 5), (1, 2), (2, 0), (2, 7))  # one layer with a single member: PEFT has a path of its own for it


def expert_set(backbone: Backbone, chosen: tuple[tuple[int, int], ...] = CHOSEN) -> ExpertSet:
    return ExpertSet(tuple(Member(*pair) for pair in chosen), {layer.index: layer.num_experts for layer in backbone})


def split(family: str, lora_rank: int | None = None, **kwargs: object) -> SplitModel:
    backbone = Backbone.of(tiny_model(family, **kwargs)).check()
    return SplitModel(backbone, expert_set(backbone), lora_rank=lora_rank)


def train(model: SplitModel, steps: int = 3, **optimiser: float) -> None:
    model.train_experts()
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-2, **optimiser)
    ids = token_ids(rows=16)  # enough tokens to reach every critical expert
    for _ in range(steps):
        model.model(ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_does_not_change_the_function(family: str, lora_rank: int | None) -> None:
    expected = tiny_model(family)(token_ids()).logits
    torch.testing.assert_close(split(family, lora_rank).model(token_ids()).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_critical_experts_move_and_fusing_keeps_the_trained_function(family: str, lora_rank: int | None) -> None:
    base = tiny_model(family)
    model = split(family, lora_rank)
    train(model, weight_decay=0.1)
    trained = model.model(token_ids()).logits.detach()
    assert not torch.allclose(trained, base(token_ids()).logits, atol=1e-3)
    model.fuse()
    torch.testing.assert_close(model.model(token_ids()).logits, trained, atol=1e-5, rtol=1e-4)

    before, after = base.state_dict(), model.model.state_dict()
    assert before.keys() == after.keys()
    fused = Backbone.of(model.model).expert_parameters()
    for name in before:
        moved = (
            (before[name] != after[name]).flatten(1).any(1) if name in fused else (before[name] != after[name]).any()
        )
        if name in fused:
            critical = [e for at, e in CHOSEN if at == int(name.split(".")[2])]
            found = moved.nonzero()[:, 0].tolist()
            if lora_rank is None:  # weight decay reaches every critical expert, routed to or not
                assert found == critical, name
            else:  # LoRA leaves biases alone, and experts that no token reached
                assert set(found) <= set(critical), name
                assert found or name.endswith("_bias"), name
        else:
            assert not moved, name


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_runs_bit_for_bit_after_training_experts_and_routers(family: str, lora_rank: int | None) -> None:
    expected = tiny_model(family)(token_ids()).logits
    model = split(family, lora_rank)
    model.train_experts(routers=True)
    ids = token_ids()
    adam = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=1e-2)
    model.model(ids, labels=ids).loss.backward()
    adam.step()
    trained = model.model(ids).logits.detach()
    with model.original() as original:
        assert torch.equal(original.model(ids).logits, expected)
    with model.original(experts=False):
        routers_back = model.model(ids).logits
    assert not torch.equal(routers_back, trained)
    assert torch.equal(model.model(ids).logits, trained)


def test_the_split_trains_like_a_masked_gradient_on_the_fused_tensors() -> None:
    ids = token_ids(rows=16)
    model = split("olmoe")
    train(model, steps=4, weight_decay=0.0)
    model.fuse()

    masked = tiny_model("olmoe").requires_grad_(False)
    fused = Backbone.of(masked).expert_parameters()
    for parameter in fused.values():
        parameter.requires_grad_(True)
    adam = torch.optim.AdamW(fused.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        masked(ids, labels=ids).loss.backward()
        for name, parameter in fused.items():
            keep = [e for at, e in CHOSEN if at == int(name.split(".")[2])]
            mask = torch.zeros(8, dtype=torch.bool)
            mask[keep] = True
            parameter.grad[~mask] = 0.0
        adam.step()
        adam.zero_grad()
    for name, parameter in masked.named_parameters():
        torch.testing.assert_close(
            model.model.get_parameter(name), parameter, atol=5e-5, rtol=1e-4
        )  # one Adam step is 1e-2


def test_optimiser_state_exists_for_critical_experts_only() -> None:
    model = split("olmoe")
    model.train_experts()
    trainable = [p for p in model.model.parameters() if p.requires_grad]
    per_expert = sum(p.numel() for p in model.backbone.expert_parameters().values()) // model.backbone.total_experts
    assert sum(p.numel() for p in trainable) == len(CHOSEN) * per_expert


def test_a_batch_that_routes_nothing_to_critical_experts_still_gives_them_a_zero_gradient() -> None:
    model = split("olmoe")
    model.train_experts()
    outside = {layer.index: torch.full((6, 2), 3) + torch.tensor([0, 1]) for layer in model.backbone}
    from trainer.moe.routing import pin

    with pin(model.backbone, outside):
        model.model(token_ids(rows=2, length=3)).logits.sum().backward()
    gradients = [p.grad for p in model.trainable().values()]
    assert all(g is not None and g.abs().sum() == 0 for g in gradients)


def test_critical_experts_of_a_bf16_model_train_in_fp32() -> None:
    model = split("olmoe", dtype=torch.bfloat16)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    model.fuse()
    assert model.model.state_dict().keys() == tiny_model("olmoe").state_dict().keys()
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_saved_state_restores_the_trained_model_on_a_fresh_split(lora_rank: int | None) -> None:
    model = split("olmoe", lora_rank)
    train(model)
    fresh = split("olmoe", lora_rank)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh.model(token_ids()).logits, model.model(token_ids()).logits)
    with pytest.raises(ValueError, match="another split"):
        fresh.load_state_dict({})


def test_an_empty_expert_set_is_refused() -> None:
    backbone = Backbone.of(tiny_model())
    with pytest.raises(ValueError, match="expert set is empty"):
        SplitModel(backbone, expert_set(backbone, ()))


def test_splitting_twice_is_refused() -> None:
    model = split("olmoe")
    with pytest.raises(ValueError, match="split already"):
        SplitModel(model.backbone, model.expert_set)


def test_a_set_of_another_model_is_refused() -> None:
    backbone = Backbone.of(tiny_model())
    with pytest.raises(ValueError, match="the model has"):
        SplitModel(backbone, ExpertSet((Member(0, 1),), {0: 8}))
