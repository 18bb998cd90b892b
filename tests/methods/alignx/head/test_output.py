"""Output calibration: kept where held-out replies gain, trained on no held-out reply, refused where it cannot fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.fit import fit, fit_output
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.head.outputs import Outputs
from trainer.methods.alignx.head.split import split
from trainer.methods.alignx.head_section import HeadSection

HIDDEN, VOCABULARY, TOKENS = 16, 12, 8
SECTION = HeadSection(fractal="off", natural="off", latent=16, epochs=3, output_epochs=20)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return banks.bank(120)


@pytest.fixture
def head(bank: Bank) -> MoCaE:
    return fit(bank, SECTION, 0).head


def lm_head() -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(4))


def outputs(rows: int, shift: float) -> Outputs:
    """States of three experts that each name the target; `shift` moves them all off to one side."""
    draw = torch.Generator().manual_seed(0)
    row_T = torch.arange(rows).repeat_interleave(TOKENS)
    targets_T = torch.randint(VOCABULARY, row_T.shape, generator=draw)
    away_H = shift * torch.randn(HIDDEN, generator=draw)
    hidden_TAH = (lm_head()[targets_T] + away_H)[:, None].repeat(1, 3, 1)
    return Outputs(hidden_TAH + 0.2 * torch.randn(hidden_TAH.shape, generator=draw), targets_T, row_T, banks.ABOUT)


def test_an_output_calibration_that_helps_is_kept(bank: Bank, head: MoCaE, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit_output(head, bank, outputs(120, 2.0), lm_head(), SECTION, 0)
    assert found is not None and found.kept and head.output is not None
    assert found.gains["the plain mixture"][1] > 0.01
    assert "head: output kept: the held-out loss falls by" in capsys.readouterr().out


def test_one_that_does_not_help_is_left_out_and_the_output_stays(bank: Bank, head: MoCaE) -> None:
    made = outputs(120, 0.0)
    made = replace(made, targets_T=made.targets_T[torch.randperm(len(made.targets_T))])
    found = fit_output(head, bank, made, lm_head(), SECTION.model_copy(update={"output_epochs": 1}), 0)
    noise = replace(made, hidden_TAH=0 * made.hidden_TAH)
    idle = fit_output(head, bank, noise, lm_head(), SECTION.model_copy(update={"output_epochs": 1}), 0)
    assert found is not None and idle is not None and not idle.kept and head.output is None
    hidden_BSH = torch.randn(1, 2, HIDDEN)
    assert torch.equal(head.correct(hidden_BSH), hidden_BSH)


def test_held_out_replies_train_nothing(bank: Bank, head: MoCaE) -> None:
    section = SECTION.model_copy(update={"output": "on", "output_epochs": 2})
    made = outputs(120, 2.0)
    fit_output(head, bank, made, lm_head(), section, 0)
    assert head.output is not None
    one = head.output.state_dict()
    is_held_T = torch.isin(made.row_T, split(bank, section.held_out, 0).held_R)
    hidden_TAH = torch.where(is_held_T[:, None, None], 5.0, made.hidden_TAH)
    targets_T = torch.where(is_held_T, 0, made.targets_T)
    fit_output(head, bank, replace(made, hidden_TAH=hidden_TAH, targets_T=targets_T), lm_head(), section, 0)
    assert head.output is not None
    assert all(torch.equal(one[name], tensor) for name, tensor in head.output.state_dict().items())


def test_switched_off_it_is_not_even_measured(bank: Bank, head: MoCaE) -> None:
    off = SECTION.model_copy(update={"output": "off"})
    assert fit_output(head, bank, outputs(120, 2.0), lm_head(), off, 0) is None and head.output is None


def test_outputs_are_read_back_bit_for_bit_and_only_for_their_base(tmp_path: Path) -> None:
    made = outputs(4, 0.0)
    path = tmp_path / "outputs.safetensors"
    made.save(path)
    read = Outputs.load(path, banks.ABOUT)
    assert all(torch.equal(getattr(read, n), getattr(made, n)) for n in ("hidden_TAH", "targets_T", "row_T"))
    with pytest.raises(UserError, match=r"outputs of another base or other adapters: base"):
        Outputs.load(path, {**banks.ABOUT, "base": "other"})


def test_outputs_that_do_not_fit_are_refused(bank: Bank, head: MoCaE) -> None:
    made = outputs(120, 0.0)
    with pytest.raises(UserError, match=r"allowed: as many|one or more"):
        replace(made, row_T=made.row_T[1:])
    with pytest.raises(UserError, match=r"states of 1 of 960 tokens are not finite"):
        broken_TAH = made.hidden_TAH.clone()
        broken_TAH[3, 0, 0] = float("nan")
        replace(made, hidden_TAH=broken_TAH)
    with pytest.raises(UserError, match=r"states of 2 axes and hidden size 16; allowed: 3 and 16"):
        fit_output(head, bank, replace(made, hidden_TAH=made.hidden_TAH[:, :2]), lm_head(), SECTION, 0)
    with pytest.raises(UserError, match=r"rows: found 1 to 120; allowed: 0 to 119"):
        fit_output(head, bank, replace(made, row_T=made.row_T + 1), lm_head(), SECTION, 0)
    with pytest.raises(UserError, match=r"targets: allowed: 0 to 4"):
        fit_output(head, bank, made, lm_head()[:5], SECTION, 0)
    held_R = split(bank, SECTION.held_out, 0).held_R
    fitting_T = ~torch.isin(made.row_T, held_R)
    some = Outputs(made.hidden_TAH[fitting_T], made.targets_T[fitting_T], made.row_T[fitting_T], {})
    with pytest.raises(UserError, match=r"no token of a held-out prompt"):
        fit_output(head, bank, some, lm_head(), SECTION, 0)


def test_the_mixture_that_is_calibrated_is_that_of_the_routed_weights(bank: Bank, head: MoCaE) -> None:
    """The expert of a prompt's own axis names the target, the others anything else: routed right, little is left to
    gain."""
    made = outputs(120, 0.0)
    own_TA = torch.nn.functional.one_hot(bank.labels_N[made.row_T], 3)[:, :, None]
    wrong_TAH = lm_head()[(made.targets_T + 1) % VOCABULARY][:, None].repeat(1, 3, 1)
    mixed = replace(made, hidden_TAH=3 * torch.where(own_TA == 1, made.hidden_TAH, wrong_TAH))
    right = fit_output(head, bank, mixed, lm_head(), SECTION, 0)
    head.W_r.data.neg_()
    wrong = fit_output(head, bank, mixed, lm_head(), SECTION, 0)
    assert right is not None and wrong is not None
    assert right.gains["the plain mixture"][0] < 2 and wrong.gains["the plain mixture"][0] > 5
