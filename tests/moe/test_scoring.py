"""The weights that a scoring family gives to experts, against the routers of transformers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from tests.moe.families import FAMILIES, SELECTION_BIAS, Family
from tests.tiny import token_ids
from trainer.moe.backbone import Backbone, MoELayer
from trainer.moe.scoring import CHOSEN, SIGMOID_RENORMALISED, SPARSEMIXER, Scoring, identify

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
biased = [family for family in FAMILIES if family.bias and family.bias != ("per_expert_scale",)]


def routed(backbone: Backbone, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(logits, weights, index) of every router with their graph, on other tokens than the check's."""
    kept = {}
    hooks = [
        layer.router.register_forward_hook(
            lambda _m, _a, output, at=layer: kept.__setitem__(at.index, at.read(output))
        )
        for layer in backbone
    ]
    backbone.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


@each_family
def test_the_family_found_on_one_batch_gives_the_weights_and_gradients_of_the_router_on_another(
    family: Family,
) -> None:
    backbone = Backbone.of(family.build()).check()
    outputs = routed(backbone, token_ids(rows=8, length=12, seed=5))
    for layer in backbone:
        logits_TE, weights_TK, index_TK = outputs[layer.index]
        ours_TK = layer.scoring.weights(logits_TE, index_TK)
        torch.testing.assert_close(ours_TK, weights_TK.float(), atol=1e-5, rtol=1e-4)
        direction_TK = torch.randn_like(weights_TK)
        parameters = [p for n, p in layer.router.named_parameters() if not n.endswith(SELECTION_BIAS)]
        theirs = torch.autograd.grad((weights_TK * direction_TK).sum(), parameters, retain_graph=True)
        found = torch.autograd.grad((ours_TK * direction_TK).sum(), parameters, retain_graph=True)
        assert any(gradient.abs().max() > 1e-4 for gradient in theirs)
        for gradient, wanted in zip(found, theirs, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


def set_selection_bias(layer: MoELayer, model: torch.nn.Module, values_E: torch.Tensor) -> None:
    block = layer.router_name.rpartition(".")[0]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith(f"{block}.") and name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.copy_(values_E.reshape(tensor.shape))


@pytest.mark.parametrize("family", biased, ids=lambda family: family.model_type)
def test_forced_experts_weigh_what_the_router_gives_them_when_its_selection_bias_chooses_them(family: Family) -> None:
    backbone = Backbone.of(family.build()).check()
    first, ids = backbone.layers[0], token_ids()
    logits_TE, _, own_TK = routed(backbone, ids)[first.index]
    for pair in ((0, 1), (2, 3), (6, 7)):  # a pair lies in one group, where there are groups
        set_selection_bias(first, backbone.model, torch.zeros(8).index_fill(0, torch.tensor(pair), 10.0))
        same_logits_TE, weights_TK, index_TK = routed(backbone, ids)[first.index]
        assert torch.equal(same_logits_TE, logits_TE)
        assert set(index_TK.unique().tolist()) == set(pair)
        forced_TK = first.scoring.weights(logits_TE, index_TK)
        torch.testing.assert_close(forced_TK, weights_TK.float(), atol=1e-5, rtol=1e-4)
    assert own_TK.unique().numel() > 2, "the bias made no difference"


@each_family
def test_only_softmax_families_are_called_shift_invariant_and_are(family: Family) -> None:
    for layer in Backbone.of(family.build()).check():
        logits_TE = 2.0 * torch.randn(64, 8)
        index_TK = logits_TE.topk(2).indices
        there, shifted = (layer.scoring.weights(logits_TE + shift, index_TK) for shift in (0.0, 1.5))
        assert torch.allclose(there, shifted, atol=1e-5) is layer.scoring.shift_invariant
        assert layer.scoring.shift_invariant is family.scoring.startswith("softmax")


@each_family
def test_a_shift_of_all_logits_counts_where_it_changes_the_familys_own_weights(family: Family) -> None:
    for layer in Backbone.of(family.build()).check():
        logits_TE = 2.0 * torch.randn(64, 8)
        index_TK = logits_TE.topk(2).indices
        there, shifted = (layer.scoring.weights(logits_TE + shift, index_TK) for shift in (0.0, 4.0))
        p_TE, q_TE = (layer.log_distribution(logits_TE + shift) for shift in (0.0, 4.0))
        torch.testing.assert_close(p_TE.exp().sum(-1), torch.ones(64))
        kl = (p_TE.exp() * (p_TE - q_TE)).sum(-1).mean().item()
        assert (kl > 1e-3) is ((there - shifted).abs().max().item() > 1e-3)
        assert (kl > 1e-3) is (not family.scoring.startswith("softmax"))


@each_family
def test_the_distribution_of_all_experts_gives_the_chosen_ones_their_relative_weights(family: Family) -> None:
    for layer in Backbone.of(family.build()).check():
        logits_TE = 2.0 * torch.randn(64, 8)
        index_TK = logits_TE.topk(2).indices
        weights_TK = Scoring(layer.scoring.family, 1.0, layer.scoring.constant).weights(logits_TE, index_TK)
        share_TK = layer.log_distribution(logits_TE).exp().gather(-1, index_TK)
        ratio = [t[:, 0] / t.sum(-1) for t in (weights_TK, share_TK)]
        if family.scoring == "sparsemixer":  # a slot's weight is of its own band, not of a common sum
            assert (share_TK.sum(-1) > 0.5).all()
        else:
            torch.testing.assert_close(ratio[1], ratio[0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), jitter=st.floats(0.005, 0.5), spread=st.floats(0.1, 4.0))
def test_sparsemixer_is_the_one_of_transformers_in_evaluation(seed: int, jitter: float, spread: float) -> None:
    logits_TE = spread * torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    weights_TK, index_TK = sparsemixer(logits_TE, jitter_eps=jitter, training=False)
    ours_TK = Scoring(SPARSEMIXER, 1.0, jitter).weights(logits_TE, index_TK)
    torch.testing.assert_close(ours_TK, weights_TK, atol=1e-6, rtol=1e-5)


def test_an_expert_forced_on_sparsemixer_from_outside_its_band_weighs_something_and_learns() -> None:
    logits_TE = torch.tensor([[5.0, 4.9, 1.0, -3.0]], requires_grad=True)
    weights_TK = Scoring(SPARSEMIXER, 1.0, 0.01).weights(logits_TE, torch.tensor([[2, 0]]))
    assert 0 < weights_TK[0, 0] < 0.1  # beside the two experts in the band
    weights_TK[0, 0].backward()
    assert logits_TE.grad[0, 2] > 0
    assert logits_TE.grad[0, 3] == 0


def test_of_two_families_that_both_come_close_the_closer_one_is_taken() -> None:
    """Small logits in bf16: a sigmoid's renormalised weights lie within the tolerance of a softmax's."""
    logits_TE = 0.05 * torch.randn(64, 8)
    index_TK = logits_TE.topk(2).indices
    weights_TK = Scoring(SIGMOID_RENORMALISED, 1.0, 1e-20).weights(logits_TE, index_TK)
    softmax_TK = Scoring(CHOSEN, 1.0).weights(logits_TE, index_TK)
    assert (weights_TK - softmax_TK).abs().max() < 2e-2
    assert identify(logits_TE.bfloat16(), weights_TK.bfloat16(), index_TK).family == SIGMOID_RENORMALISED


def test_a_factor_is_measured_or_taken_from_the_router_where_it_names_one() -> None:
    logits_TE = torch.randn(64, 8)
    index_TK = logits_TE.topk(2).indices
    weights_TK = Scoring(CHOSEN, 2.5).weights(logits_TE, index_TK)
    assert identify(logits_TE, weights_TK, index_TK).scale == pytest.approx(2.5, abs=1e-5)
    rounded = weights_TK.bfloat16()
    assert identify(logits_TE.bfloat16(), rounded, index_TK, declared_scale=2.5).scale == 2.5
    assert identify(logits_TE, weights_TK, index_TK, declared_scale=7.0).scale == pytest.approx(2.5, abs=1e-5)
