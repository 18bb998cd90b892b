"""The bank: kept bit for bit, refused where it is not what a head can be fitted on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.outputs import Outputs


def test_a_bank_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    made = banks.bank(12)
    made.save(tmp_path / "bank.safetensors")
    read = Bank.load(tmp_path / "bank.safetensors", axes=banks.AXES, expected_about=banks.ABOUT)
    assert torch.equal(read.features_NVD, made.features_NVD) and torch.equal(read.labels_N, made.labels_N)
    assert (read.groups_N, read.axes, read.about) == (made.groups_N, made.axes, made.about)


def test_a_bank_of_other_axes_or_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    banks.bank(12).save(path)
    with pytest.raises(UserError, match=r"axes: found helpful, harmless, honest; allowed: honest, helpful, harmless"):
        Bank.load(path, axes=("honest", "helpful", "harmless"))
    with pytest.raises(UserError, match=r"bank of another base .*: base: found 'b0'; allowed: 'b1'"):
        Bank.load(path, expected_about={**banks.ABOUT, "base": "b1"})


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    with pytest.raises(UserError, match=r"bank.safetensors: missing"):
        Bank.load(path)
    banks.bank(12).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"bank.safetensors: damaged or truncated"):
        Bank.load(path)
    hidden_TAH = torch.zeros(2, 3, 4)
    Outputs(hidden_TAH, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), {}).save(path)
    with pytest.raises(UserError, match=r"format: found 'routealign-alignx-outputs-1'; allowed: '.*bank-1'"):
        Bank.load(path)


@pytest.mark.parametrize(("axes", "said"), [(("helpful",), "found 1"), (("a", "b", "a"), "found 'a' twice")])
def test_one_axis_and_two_of_a_name_are_refused(axes: tuple[str, ...], said: str) -> None:
    features_NVD = torch.zeros(6, 1 + len(axes), 4)
    with pytest.raises(UserError, match=said):
        Bank(features_NVD, torch.arange(6) % len(axes), ["g"] * 6, axes)


def test_states_that_are_not_finite_are_refused_with_their_number_and_axis() -> None:
    made = banks.bank(12)
    features_NVD = made.features_NVD.clone()
    features_NVD[4, 2, 0], features_NVD[7, 0, 3] = float("nan"), float("inf")
    with pytest.raises(UserError, match=r"2 of 12 rows are not finite, the first of axis 'harmless'"):
        replace(made, features_NVD=features_NVD)


def test_an_axis_without_prompts_is_refused() -> None:
    made = banks.bank(12)
    with pytest.raises(UserError, match=r"axis 'honest': found no prompt"):
        replace(made, labels_N=made.labels_N.clamp_max(1))


def test_sizes_that_do_not_fit_are_refused() -> None:
    made = banks.bank(12)
    with pytest.raises(UserError, match=r"12 rows of features, 12 labels and 11 groups"):
        replace(made, groups_N=made.groups_N[1:])
    with pytest.raises(UserError, match=r"allowed: \[prompts, 4, hidden size\] float32"):
        replace(made, features_NVD=made.features_NVD[:, :3])
    with pytest.raises(UserError, match=r"allowed: \[prompts, 4, hidden size\] float32"):
        replace(made, features_NVD=made.features_NVD.double())
    with pytest.raises(UserError, match=r"labels: allowed: int64 from 0 to 2"):
        replace(made, labels_N=made.labels_N + 1)
