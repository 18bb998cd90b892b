"""A packed model is corrected where it is dequantised: exact along the direction, and its bytes never change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.corrections import correction_of, slices, state_of
from tests.moe.families import FAMILIES, Family
from tests.tiny import token_ids
from trainer.moe.backbone import Backbone
from trainer.moe.quantised import Kind, quantise
from trainer.moe.rank_one import correct, corrected
from trainer.moe.writers import Writer, find_writers

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

KINDS: tuple[Kind, ...] = ("4bit", "8bit")


def tensor_at(model: torch.nn.Module, name: str) -> Tensor:
    """As a forward reads it."""
    module, _, own = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), own)
    return tensor.detach()


def writers_packed(family: Family, kind: Kind) -> tuple[Backbone, list[Writer]]:
    backbone = Backbone.of(family.build())
    quantise(backbone, kind, torch.device("cpu"))
    return backbone, find_writers(backbone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_packed_model_is_corrected_where_it_is_dequantised_and_its_bytes_stay(family: Family, kind: Kind) -> None:
    backbone, writers = writers_packed(family, kind)
    assert writers == find_writers(Backbone.of(family.build())), "packing hides no writer"
    correction = correction_of(writers, 0.7)
    footprint, model = correction.footprint(writers).rows, backbone.model
    held, ids = state_of(backbone), token_ids()
    read = {name: tensor_at(model, name).clone() for name in footprint}
    logits = model(ids).logits
    with corrected(backbone, writers, [correction]) as extent:
        assert extent.unchanged == () and 0 < extent.relative < 1
        assert extent.of_parameters == sum(p.numel() for p in family.build().parameters())
        for writer in writers:
            d = correction.directions.get(writer.layer) if correction.directions else None
            for row in slices(writer, correction.units):
                old, new = (
                    of if row is None else of[row] for of in (read[writer.weight], tensor_at(model, writer.weight))
                )
                if writer.is_transposed:
                    old, new = old.T, new.T
                assert d is not None
                torch.testing.assert_close(d @ new, 0.3 * (d @ old), atol=1e-6, rtol=0)
        for name, rows in footprint.items():
            others = [] if rows is None else [row for row in range(len(read[name])) if row not in rows]
            assert all(torch.equal(tensor_at(model, name)[row], read[name][row]) for row in others)
        packed_bytes = {name: tensor for name, tensor in held.items() if name.endswith(".original")}
        assert packed_bytes and all(torch.equal(model.state_dict()[name], held[name]) for name in packed_bytes)
        assert not torch.equal(model(ids).logits, logits)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)


def test_an_edit_that_fails_in_its_middle_leaves_a_packed_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.moe import rank_one

    backbone, writers = writers_packed(FAMILIES[0], "4bit")
    logits, calls = backbone.model(token_ids()).logits, iter(range(1000))
    scaled = rank_one._scaled_along

    def fails(*args: Any, **options: Any) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return scaled(*args, **options)

    monkeypatch.setattr(rank_one, "_scaled_along", fails)
    with pytest.raises(KeyboardInterrupt), corrected(backbone, writers, [correction_of(writers)]):
        pass
    assert torch.equal(backbone.model(token_ids()).logits, logits)


def test_two_corrections_of_a_packed_tensor_compose_in_their_order() -> None:
    backbone, writers = writers_packed(FAMILIES[0], "8bit")
    first, second = correction_of(writers, 0.6, seed=0), correction_of(writers, -0.5, seed=40)
    assert first.directions and second.directions
    name = next(writer.weight for writer in writers if writer.is_fused and writer.layer == 0)
    old = tensor_at(backbone.model, name)[1].double()
    d1, d2 = first.directions[0].double(), second.directions[0].double()
    with corrected(backbone, writers, [first, second]):
        once = old - 0.6 * torch.outer(d1, d1 @ old)
        wanted = once + 0.5 * torch.outer(d2, d2 @ once)
        torch.testing.assert_close(tensor_at(backbone.model, name)[1].double(), wanted, atol=1e-6, rtol=0)


def test_a_packed_tensor_is_never_corrected_for_good() -> None:
    backbone, writers = writers_packed(FAMILIES[0], "4bit")
    held = state_of(backbone)
    with pytest.raises(ValueError, match="quantised, so it cannot be corrected in place; correct an unquantised copy"):
        correct(backbone, writers, correction_of(writers))
    assert all(torch.equal(tensor, held[name]) for name, tensor in backbone.model.state_dict().items())
