"""Corrections of writers: exact along the direction, nothing else moves, and the bytes come back whatever happens."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from tests.moe.corrections import D, correction_of, direction, slices, state_of
from tests.moe.families import FAMILIES, Family
from trainer.moe.backbone import Backbone
from trainer.moe.rank_one import Correction, Unit, correct, corrected
from trainer.moe.writers import Writer, find_writers


def tiny(model_type: str, dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone.of(next(family for family in FAMILIES if family.model_type == model_type).build().to(dtype))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_chosen_slice_changes_along_the_direction_and_nothing_else_moves(family: Family) -> None:
    backbone = Backbone.of(family.build())
    for name, parameter in backbone.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    writers = find_writers(backbone)
    assert {writer.layer for writer in writers if writer.is_fused} == {layer.index for layer in backbone}
    assert (
        sum(writer.kind == "mixer" for writer in writers) == backbone.model.config.get_text_config().num_hidden_layers
    )
    assert sum(w.kind == "shared" for w in writers) >= len(backbone.shared_layers)
    assert find_writers(Backbone.of(family.build().to("meta"))) == writers, "what a plan counts"
    correction, before = correction_of(writers), state_of(backbone)
    extent = correct(backbone, writers, correction)
    after = state_of(backbone)
    footprint = correction.footprint(writers)
    assert extent.unchanged == () and extent.units == len(correction.units) and 0 < extent.relative < 1
    for writer in writers:
        d = correction.directions.get(writer.layer)
        chosen = list(slices(writer, correction.units))
        for name in (writer.weight, writer.bias):
            for row in chosen if name is not None else []:
                assert name is not None and d is not None
                old, new = (state[name] if row is None else state[name][row] for state in (before, after))
                if old.ndim == 2 and writer.is_transposed:
                    old, new = old.T, new.T
                torch.testing.assert_close(d @ new, 0.3 * (d @ old), atol=1e-6, rtol=0)
                aside = torch.eye(D) - torch.outer(d, d)
                torch.testing.assert_close(aside @ new, aside @ old, atol=1e-6, rtol=0)
                assert not torch.equal(new, old)
    for name, old in before.items():
        rows = footprint.rows.get(name, frozenset())
        kept = [] if rows is None else [row for row in range(len(old) if old.ndim else 0) if row not in rows]
        if rows is not None and not rows:
            assert torch.equal(after[name], old), name
        for row in kept:
            assert torch.equal(after[name][row], old[row]), (name, row)


@pytest.fixture
def split() -> tuple[Backbone, list[Writer]]:
    backbone = tiny("qwen2_moe")
    return backbone, find_writers(backbone)


Model = tuple[Backbone, list[Writer]]


def test_strength_0_is_the_identity_bit_for_bit(split: Model) -> None:
    before = state_of(split[0])
    assert correct(*split, correction_of(split[1], 0.0)).units == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in split[0].model.state_dict().items())


def test_two_corrections_compose_in_their_order(split: Model) -> None:
    backbone, writers = split
    first, second = correction_of(writers, 0.6, seed=0), correction_of(writers, -0.5, seed=40)
    name = next(writer.weight for writer in writers if writer.is_fused and writer.layer == 0)
    old = backbone.model.get_parameter(name)[1].detach().clone()
    with corrected(backbone, writers, [first, second]):
        d1, d2 = first.directions[0].double(), second.directions[0].double()
        eye = torch.eye(D, dtype=torch.float64)
        wanted = (eye + 0.5 * torch.outer(d2, d2)) @ (eye - 0.6 * torch.outer(d1, d1)) @ old.double()
        torch.testing.assert_close(backbone.model.get_parameter(name)[1].double(), wanted, atol=1e-6, rtol=0)


class Broken(Exception):
    pass


@pytest.mark.parametrize("how", ["leaving", "exception", "ctrl-c", "sigterm", "in the middle"])
def test_the_bytes_come_back_whatever_happens(split: Model, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, writers = split
    before, correction = state_of(backbone), correction_of(writers)

    def stop(*_: object) -> None:
        raise Broken

    def edit() -> None:
        with corrected(backbone, writers, [correction]) as extent:
            assert extent.units and not torch.equal(
                backbone.model.get_parameter(writers[0].weight), before[writers[0].weight]
            )
            if how == "exception":
                raise Broken
            if how in ("ctrl-c", "sigterm"):
                os.kill(os.getpid(), signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, stop)
    if how == "in the middle":
        from trainer.moe import rank_one

        calls = iter(range(100))
        scaled = rank_one._scaled_along
        monkeypatch.setattr(rank_one, "_scaled_along", lambda *a, **k: stop() if next(calls) == 5 else scaled(*a, **k))
    try:
        if how == "leaving":
            edit()
        else:
            with pytest.raises(KeyboardInterrupt if how == "ctrl-c" else Broken):
                edit()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


def test_what_cannot_be_is_refused_by_name(split: Model) -> None:
    backbone, writers = split
    good = correction_of(writers)
    for strength in (2.5, float("nan"), -3.0):
        with pytest.raises(ValueError, match="expected a number of at most 2 either way"):
            replace(good, strength=strength)
    with pytest.raises(ValueError, match="expected 1"):
        replace(good, directions={layer: 2 * d for layer, d in good.directions.items()})
    with pytest.raises(ValueError, match="expected 1"):
        replace(good, directions={layer: torch.full((D,), float("nan")) for layer in good.directions})
    with pytest.raises(ValueError, match=r"layers \[0\] are to be corrected and have no direction"):
        replace(good, directions={layer: d for layer, d in good.directions.items() if layer != 0})
    with pytest.raises(ValueError, match="named twice"):
        replace(good, units=good.units + good.units[:1])
    with pytest.raises(ValueError, match="no experts in layer 9"):
        correct(backbone, writers, Correction((Unit(9, "experts", 0),), {9: direction(0)}, 0.5))
    with pytest.raises(ValueError, match="experts are named for experts alone"):
        correct(backbone, writers, Correction((Unit(0, "experts"),), {0: direction(0)}, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_corrected_in_fp32_and_keep_their_type(dtype: torch.dtype) -> None:
    backbone = tiny("mixtral", dtype)
    writers = find_writers(backbone)
    before = state_of(backbone)
    correct(backbone, writers, correction_of(writers))
    writer = next(writer for writer in writers if writer.is_fused)
    d = direction(writer.layer)
    new, old = backbone.model.get_parameter(writer.weight)[1], before[writer.weight][1].float()
    assert new.dtype == dtype
    wanted = (old - 0.7 * torch.outer(d, d @ old)).to(dtype)
    assert torch.equal(new, wanted)
