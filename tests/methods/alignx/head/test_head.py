"""The head: neutral as built, the same for a prompt whatever stands beside it, bit for bit on disk, nobody else's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.fit import fit
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.head.output import Output
from trainer.methods.alignx.head_section import HeadSection

EVERY_PIECE = HeadSection(fractal="on", natural="on", isotonic="on", epochs=5, latent=32)


@pytest.fixture(scope="module")
def fitted() -> MoCaE:
    """A head with every piece, its output calibration with weights of its own."""
    head = fit(banks.bank(180, wrong=0.2), EVERY_PIECE, 0).head
    generator = torch.Generator().manual_seed(1)
    head.output = Output.drawn(banks.D, 32, generator)
    for parameter in head.output.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return head


def test_a_head_as_built_is_the_plain_mixture() -> None:
    head = MoCaE(banks.AXES, banks.D, 32)
    alpha_BA = head.alpha(banks.bank(9).features_NVD)
    assert torch.equal(alpha_BA, torch.full((9, 3), 1 / 3))
    hidden_BSH = torch.randn(2, 5, banks.D)
    assert head.correct(hidden_BSH) is hidden_BSH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_output_calibration_is_the_identity(dtype: torch.dtype) -> None:
    head = MoCaE(banks.AXES, banks.D, 32)
    hidden_BSH = torch.randn(2, 5, banks.D).to(dtype)
    for untrained in (Output(banks.D, 16), Output.drawn(banks.D, 16, torch.Generator().manual_seed(0))):
        head.output = untrained
        corrected_BSH = head.correct(hidden_BSH)
        assert corrected_BSH.dtype == dtype and torch.equal(corrected_BSH, hidden_BSH)


def test_the_output_calibration_adds_what_its_formula_says(fitted: MoCaE) -> None:
    assert fitted.output is not None
    W = {name: tensor.double() for name, tensor in fitted.output.state_dict().items()}
    y_BSH = torch.randn(2, 3, banks.D, generator=torch.Generator().manual_seed(0))
    y = y_BSH.double()
    tanh = (y @ W["n.weight"].T + W["n.bias"]).tanh()
    relu = (y @ W["three.weight"].T).relu() @ W["four.weight"].T
    assert torch.allclose(fitted.correct(y_BSH).double(), y + tanh + relu, atol=1e-4)


def test_weights_sum_to_1_and_do_not_depend_on_the_batch(fitted: MoCaE) -> None:
    features_BVD = banks.bank(60, seed=3).features_NVD
    alpha_BA = fitted.alpha(features_BVD)
    assert alpha_BA.dtype == torch.float32
    assert torch.allclose(alpha_BA.sum(1), torch.ones(60), atol=1e-6)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fitted.alpha(features_BVD[order]), alpha_BA[order], atol=1e-5)
    alone_BA = torch.cat([fitted.alpha(one[None]) for one in features_BVD])
    assert torch.allclose(alone_BA, alpha_BA, atol=1e-5)


def test_a_prompt_of_the_bank_is_routed_as_it_was_fitted(fitted: MoCaE) -> None:
    """Its own row in the bank does not count as a neighbour, under any rounding of another batch."""
    features_BVD = banks.bank(180, wrong=0.2).features_NVD
    together_BA = fitted.logits(features_BVD)
    assert torch.allclose(fitted.logits(features_BVD[7:8]), together_BA[7:8], atol=1e-4)


def test_a_head_is_read_back_bit_for_bit(fitted: MoCaE, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    fitted.save(path, banks.ABOUT)
    read = MoCaE.load(path, banks.ABOUT)
    assert read.axes == banks.AXES
    mine, theirs = fitted.state_dict(), read.state_dict()
    assert mine.keys() == theirs.keys() and {"fractal.bank_NK", "isotonic.x_AJ", "output.n.weight"} <= mine.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    features_BVD, hidden_BSH = banks.bank(9, seed=5).features_NVD, torch.randn(2, 3, banks.D)
    assert torch.equal(read.alpha(features_BVD), fitted.alpha(features_BVD))
    assert torch.equal(read.correct(hidden_BSH), fitted.correct(hidden_BSH))


def test_a_head_of_another_base_or_other_adapters_is_refused(fitted: MoCaE, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    fitted.save(path, banks.ABOUT)
    for key in ("base", "harmless", "layer"):
        with pytest.raises(UserError, match=rf"head of another base or other adapters: {key}: found .*; allowed: 'x'"):
            MoCaE.load(path, {**banks.ABOUT, key: "x"})
    fewer = {key: value for key, value in banks.ABOUT.items() if key != "honest"}
    with pytest.raises(UserError, match=r"honest: found 'a3'; allowed: None"):
        MoCaE.load(path, fewer)


def test_damaged_heads_are_refused(fitted: MoCaE, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    fitted.save(path, banks.ABOUT)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"head.safetensors: damaged or truncated"):
        MoCaE.load(path, banks.ABOUT)
    path.write_bytes(whole)
    tensors = load_file(path)
    fitted.save(path, banks.ABOUT)
    save_file(tensors, path, metadata={"format": "routealign-mocae-1"})
    with pytest.raises(UserError, match=r"head.safetensors: header: .*expected axes, about"):
        MoCaE.load(path, banks.ABOUT)
    with pytest.raises(UserError, match=r"head.safetensors: not the tensors of a head"):
        _with(fitted, path, {"W_r": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"head.safetensors: not the tensors of a head"):
        _with(fitted, path, {"projection.P_KD": torch.zeros(3)})


def _with(head: MoCaE, path: Path, changed: dict[str, torch.Tensor]) -> MoCaE:
    from trainer.methods.alignx.head import files

    tensors = head.state_dict() | changed
    files.write(path, "routealign-mocae-1", tensors, {"axes": banks.AXES, "about": banks.ABOUT})
    return MoCaE.load(path, banks.ABOUT)


def test_features_that_are_not_finite_are_refused(fitted: MoCaE) -> None:
    features_BVD = banks.bank(6).features_NVD.clone()
    features_BVD[4, 1, 2] = float("nan")
    with pytest.raises(UserError, match=r"features: prompt 4 of 6 is not finite"):
        fitted.alpha(features_BVD)


def test_one_axis_and_two_of_a_name_are_refused() -> None:
    for axes in (("a",), ("a", "a")):
        with pytest.raises(UserError, match=r"axes: found"):
            MoCaE(axes, 8, 4)
