"""The head sees response positions alone, and says there what it says in a whole forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.moe.families import FAMILIES, Family
from tests.tiny import tiny_model, token_ids
from trainer.runtime.peak import cost_of
from trainer.training.responses import head_on, response_logits


def batch(ids_BS: Tensor) -> dict[str, Tensor]:
    """Responses of different length and place; the last row is padded."""
    response_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    mask_BS = torch.ones_like(ids_BS)
    for row, (first, end) in enumerate(((3, 6), (5, ids_BS.shape[1]), (2, 4))):
        response_BS[row, first:end] = True
    mask_BS[2, 4:] = 0
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "response": response_BS}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_logits_are_those_of_a_whole_forward_pass_at_the_positions_before_response_tokens(family: Family) -> None:
    model = family.build().eval()
    inputs = batch(token_ids(rows=3))
    said = response_logits(model, model, inputs)
    whole_BSV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    wanted = [
        (row, position)
        for row in range(3)
        for position in range(1, inputs["input_ids"].shape[1])
        if inputs["response"][row, position]
    ]
    assert said.row_N.tolist() == [row for row, _ in wanted]
    assert said.targets_N.tolist() == [int(inputs["input_ids"][place]) for place in wanted]
    expected_NV = torch.stack([whole_BSV[row, position - 1] for row, position in wanted])
    torch.testing.assert_close(said.logits_NV, expected_NV, atol=1e-5, rtol=1e-4)


def test_means_are_taken_row_by_row_and_gradients_reach_each_token_once() -> None:
    model = tiny_model()
    said = response_logits(model, model, batch(token_ids(rows=3)))
    values_N = torch.arange(1.0, len(said.targets_N) + 1, requires_grad=True)
    lengths = said.mask_BR.sum(1).tolist()
    parts = values_N.detach().split(lengths)
    assert said.mean_by_row(values_N).tolist() == pytest.approx([float(part.mean()) for part in parts])
    said.mean_by_row(values_N).sum().backward()
    assert values_N.grad is not None
    assert values_N.grad.tolist() == pytest.approx([1 / lengths[int(row)] for row in said.row_N])


def test_the_head_is_given_no_other_position_and_is_whole_again_after_an_error() -> None:
    model = tiny_model()
    inputs, seen = batch(token_ids(rows=3)), list[int]()

    def count(_head: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].shape[:-1].numel())

    head = model.get_output_embeddings()
    with head_on(model, inputs["response"][:, 1:]), head.register_forward_pre_hook(count):
        model(input_ids=inputs["input_ids"])
    assert seen == [int(inputs["response"].sum())]
    with pytest.raises(RuntimeError, match="on purpose"), head_on(model, inputs["response"][:, 1:]):
        raise RuntimeError("on purpose")
    assert model(input_ids=inputs["input_ids"]).logits.shape[:2] == inputs["input_ids"].shape


def test_at_a_large_vocabulary_a_loss_takes_the_memory_of_its_response_positions() -> None:
    """Prompts of different length: cutting off what lies before the first response would keep most positions."""
    torch.manual_seed(0)
    model = tiny_model()
    model.resize_token_embeddings(151_936)
    model.requires_grad_(False)
    rows, length, said_each = 8, 128, 32
    ids_BS = torch.randint(2, 1000, (rows, length))
    response_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for row in range(rows):
        response_BS[row, 10 * row + 4 :][:said_each] = True
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "response": response_BS}
    head = model.get_output_embeddings()
    hidden_ND = torch.randn(rows * said_each, head.in_features)

    def bare() -> None:
        hidden = hidden_ND.clone().requires_grad_(True)
        F.cross_entropy(head(hidden).float(), ids_BS[response_BS]).backward()

    def loss() -> Tensor:
        said = response_logits(model, model, inputs)
        return said.mean_by_row(F.cross_entropy(said.logits_NV.float(), said.targets_N, reduction="none")).mean()

    def whole() -> None:
        model.get_input_embeddings().requires_grad_(True)
        loss().backward()
        model.zero_grad()

    for call in (bare, whole):
        call()  # pays for what is made once
    alone, found = (cost_of(call, torch.device("cpu")).grown for call in (bare, whole))
    if alone is None or found is None:
        pytest.skip("resident memory is read on Linux alone")
    assert found <= 1.2 * alone
