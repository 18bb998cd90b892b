"""Weights that train in fp32 under a 16-bit model: what is computed, and what comes back."""

from __future__ import annotations

import pytest
import torch

from tests.moe.families import FAMILIES, Family
from tests.tiny import token_ids
from trainer.moe.backbone import Backbone
from trainer.moe.trainable import WholeModel


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@torch.no_grad()
def test_a_whole_16_bit_model_held_in_fp32_computes_the_same_bits_and_gets_its_types_back(family: Family) -> None:
    """Among them convolutions that another module reads, and parameters beside submodules with their own."""
    model, ids = family.build().bfloat16(), token_ids(rows=2)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    expected = model(input_ids=ids, use_cache=False).logits
    whole = WholeModel(Backbone.of(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and whole.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert {name: t.dtype for name, t in whole.stock_state() if name in dtypes} == dtypes
    whole.fuse()
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
