"""Recording and pinning a router's decisions."""

import pytest
import torch

from tests.tiny import FAMILIES, tiny_model, token_ids
from trainer.moe.backbone import Backbone
from trainer.moe.routing import flip_rate, pin, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_pinning_a_model_to_its_own_routing_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(family, dtype=dtype), token_ids()
    backbone = Backbone.of(model).check()
    with torch.no_grad(), record(backbone) as trace:
        expected = model(ids).logits
    with torch.no_grad(), pin(backbone, trace.index_TK):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_pinned_experts_are_the_ones_that_run(family: str) -> None:
    model, ids = tiny_model(family), token_ids()
    backbone = Backbone.of(model).check()
    with torch.no_grad(), record(backbone) as before:
        model(ids)
    forced = {i: (t + 3) % 8 for i, t in before.index_TK.items()}
    called = {}
    for layer in backbone:
        layer.experts.register_forward_pre_hook(lambda _m, args, i=layer.index: called.__setitem__(i, args[1]))
    with torch.no_grad(), pin(backbone, forced):
        model(ids)
    assert all(torch.equal(called[i], forced[i]) for i in forced)


def test_weights_of_pinned_experts_carry_a_gradient_to_the_router() -> None:
    model, ids = tiny_model(), token_ids()
    backbone = Backbone.of(model).check()
    with record(backbone) as trace:
        model(ids)
    with pin(backbone, {i: (t + 1) % 8 for i, t in trace.index_TK.items()}):
        model(ids).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.router_parameters().values())


def test_hooks_are_gone_after_an_error_inside() -> None:
    model = tiny_model()
    backbone = Backbone.of(model).check()
    for context in (record(backbone), pin(backbone, {i: torch.zeros(1, 2).long() for i in range(3)})):
        with pytest.raises(RuntimeError), context:
            raise RuntimeError("inside")
    assert not any(m._forward_hooks for m in model.modules())


def test_two_batches_in_one_recording_are_refused() -> None:
    model = tiny_model()
    backbone = Backbone.of(model).check()
    with pytest.raises(ValueError, match="one forward pass per context"), record(backbone):
        model(token_ids())
        model(token_ids())


def test_a_batch_of_another_size_than_the_recorded_one_is_refused() -> None:
    model = tiny_model()
    backbone = Backbone.of(model).check()
    with record(backbone) as trace:
        model(token_ids(rows=3))
    with pytest.raises(ValueError, match="layer 0 routes"), pin(backbone, trace.index_TK):
        model(token_ids(rows=2))


def test_a_router_of_unknown_family_cannot_be_pinned() -> None:
    backbone = Backbone.of(tiny_model())
    with (
        pytest.raises(ValueError, match="scoring family"),
        pin(backbone, {i: torch.zeros(1, 2).long() for i in range(3)}),
    ):
        pass


def test_recorded_logits_keep_their_graph_only_when_asked() -> None:
    model = tiny_model()
    backbone = Backbone.of(model).check()
    for grad in (False, True):
        with record(backbone, grad=grad) as trace:
            model(token_ids())
        assert trace.logits_TE[2].requires_grad is grad


def test_flip_rate_ignores_the_order_of_the_chosen_experts() -> None:
    before = torch.tensor([[0, 1], [2, 3]])
    assert flip_rate(before, torch.tensor([[1, 0], [3, 2]])) == 0.0
    assert flip_rate(before, torch.tensor([[1, 4], [2, 3]])) == 0.25
