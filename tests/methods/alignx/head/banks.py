"""Synthetic banks whose answer is known: axes that lie apart, that differ in dimension alone, or whose labels lie.

Shapes: N prompts, V views, D hidden size.
"""

from __future__ import annotations

import torch

from trainer.methods.alignx.head.bank import Bank

AXES = ("helpful", "harmless", "honest")
ABOUT = {"base": "b0", "helpful": "a1", "harmless": "a2", "honest": "a3", "layer": "3", "position": "last"}
D = 128
GROUP = 3
"""Prompts of a group."""


def bank(rows: int, *, apart: float = 1.0, wrong: float = 0.0, seed: int = 0) -> Bank:
    """Axes whose means lie `apart` (1: every prompt can be told); a share of the labels is `wrong`."""
    draw, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    means_AD = apart * torch.randn(len(AXES), D, generator=fixed) / D**0.5
    labels_N = torch.arange(rows) % len(AXES)
    x_ND = means_AD[labels_N] + torch.randn(rows, D, generator=draw) / D**0.5
    return _bank(x_ND, _mistaken(labels_N, wrong, draw), draw)


def of_dimensions(rows: int, dimensions: tuple[int, ...] = (2, 6, 20), *, seed: int = 0) -> Bank:
    """Axes with the same mean and the same spread, on flat sheets of different dimension through one point."""
    draw, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    sheets = [torch.linalg.qr(torch.randn(D, d, generator=fixed))[0].T / d**0.5 for d in dimensions]
    labels_N = torch.arange(rows) % len(AXES)
    x_ND = torch.stack([torch.randn(len(sheets[a]), generator=draw) @ sheets[a] for a in labels_N.tolist()])
    return _bank(x_ND, labels_N, draw)


def constant(rows: int) -> Bank:
    """Every prompt the same state, but for the last bit of its numbers, as it may come from batches of other sizes."""
    labels_N = torch.arange(rows) % len(AXES)
    draw = torch.Generator().manual_seed(0)
    state_VD = torch.randn(1 + len(AXES), D, generator=draw)
    is_up_NVD = torch.rand(rows, 1 + len(AXES), D, generator=draw) < 0.5
    features_NVD = torch.where(is_up_NVD, state_VD.nextafter(torch.tensor(torch.inf)), state_VD)
    return Bank(features_NVD, labels_N, _groups(rows), AXES, ABOUT)


def _bank(x_ND: torch.Tensor, labels_N: torch.Tensor, draw: torch.Generator) -> Bank:
    """Every view a shift of the same state, with a little noise, over a large part that all prompts share."""
    rows = len(x_ND)
    fixed = torch.Generator().manual_seed(7)
    shared_D, shift_VD = 10 * torch.randn(D, generator=fixed), torch.randn(1 + len(AXES), D, generator=fixed)
    noise_NVD = 0.02 * torch.randn(rows, 1 + len(AXES), D, generator=draw)
    return Bank(shared_D + shift_VD + x_ND[:, None] + noise_NVD, labels_N, _groups(rows), AXES, ABOUT)


def _groups(rows: int) -> list[str]:
    return [f"q{row // GROUP}" for row in range(rows)]


def _mistaken(labels_N: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    is_wrong_N = torch.rand(len(labels_N), generator=draw) < share
    others_N = (labels_N + torch.randint(1, len(AXES), labels_N.shape, generator=draw)) % len(AXES)
    return torch.where(is_wrong_N, others_N, labels_N)
