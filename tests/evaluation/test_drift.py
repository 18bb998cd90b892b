import math

import pytest
import torch

from trainer.evaluation.drift import drift_per_layer, routing_kl, topk_flip_rate

ALL = torch.ones(3, dtype=torch.long)


def test_flip_rate_counts_experts_that_left_and_ignores_slot_order():
    a = torch.tensor([[0, 1], [2, 3], [4, 5]])
    b = torch.tensor([[1, 0], [2, 7], [6, 7]])
    assert topk_flip_rate(a, a, ALL) == 0
    assert topk_flip_rate(a, b, ALL) == pytest.approx(3 / 6)
    assert topk_flip_rate(a, b, torch.tensor([1, 1, 0])) == pytest.approx(1 / 4)


def test_kl_is_the_textbook_sum_in_float32_and_not_symmetric():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.8, 0.1, 0.1]])
    one = torch.ones(1, dtype=torch.bool)
    expected = 0.5 * math.log(0.5 / 0.8) + 2 * 0.25 * math.log(0.25 / 0.1)
    assert routing_kl(p.log() + 3, q.log() - 2, one) == pytest.approx(expected, rel=1e-5)
    assert routing_kl(q.log(), p.log(), one) != pytest.approx(expected, rel=1e-2)
    assert routing_kl(p.log().bfloat16(), p.log().bfloat16(), one) == 0


def test_experts_ruled_out_by_both_add_nothing():
    a = torch.tensor([[0.0, 1.0, -math.inf]])
    one = torch.ones(1)
    assert routing_kl(a, a.clone(), one) == 0
    assert routing_kl(torch.zeros(1, 3), a, one) == math.inf


def test_padding_tokens_do_not_count():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    b[0] = a[0]
    assert routing_kl(a, b, torch.tensor([True, False, False])) == pytest.approx(0, abs=1e-6)


def test_layers_are_paired_and_sorted():
    indices = {5: torch.tensor([[0, 1]]), 2: torch.tensor([[2, 3]])}
    logits = {5: torch.zeros(1, 4), 2: torch.ones(1, 4)}
    moved = {5: torch.tensor([[0, 2]]), 2: torch.tensor([[2, 3]])}
    rows = drift_per_layer(indices, moved, logits, logits, torch.ones(1))
    assert rows == [{"layer": 2, "flip_rate": 0.0, "kl": 0.0}, {"layer": 5, "flip_rate": 0.5, "kl": 0.0}]
    with pytest.raises(ValueError, match="layers"):
        drift_per_layer(indices, {5: indices[5]}, logits, logits, torch.ones(1))


def test_undefined_drift_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        topk_flip_rate(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="shapes"):
        routing_kl(torch.zeros(2, 2), torch.zeros(2, 3), torch.ones(2))
