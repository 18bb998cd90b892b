"""What a head is fitted on: hidden states of prompts under the base and under each axis' adapter, cached once.

Shapes: N prompts, V views (base, then the axes in their order), D hidden size, A axes; V = 1 + A.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import UserError
from trainer.methods.alignx.head import files

FORMAT = "routealign-alignx-bank-1"


@dataclass(frozen=True)
class Bank:
    """Hidden states of labelled prompts.

    `features_NVD`: fp32. `labels_N`: int64, the index in `axes` of the axis that a prompt belongs to. `groups_N`:
    prompts of one group (a question and its rewordings, say) are never split between fitting and held-out data.
    `about`: what the states were made with: hash of the base, of each adapter, layer, position.

    Raises:
        UserError: fewer than two axes, two of the same name, an axis without prompts, states that are not finite,
            or sizes that do not fit together.
    """

    features_NVD: Tensor
    labels_N: Tensor
    groups_N: list[str]
    axes: tuple[str, ...]
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_axes(self.axes)
        shape, views = tuple(self.features_NVD.shape), 1 + len(self.axes)
        if self.features_NVD.ndim != 3 or shape[1] != views or self.features_NVD.dtype != torch.float32:
            raise UserError(
                f"bank: features: found {list(shape)} {self.features_NVD.dtype}; allowed: [prompts, {views}, hidden "
                f"size] float32, with the base and the {len(self.axes)} axes as views"
            )
        if not shape[0] == len(self.labels_N) == len(self.groups_N):
            raise UserError(
                f"bank: found {shape[0]} rows of features, {len(self.labels_N)} labels and {len(self.groups_N)} "
                "groups; allowed: as many of each"
            )
        if self.labels_N.dtype != torch.int64 or not ((self.labels_N >= 0) & (self.labels_N < len(self.axes))).all():
            raise UserError(f"bank: labels: allowed: int64 from 0 to {len(self.axes) - 1}, the axes in their order")
        rows = Counter(self.labels_N.tolist())
        for index, axis in enumerate(self.axes):
            if not rows[index]:
                raise UserError(f"bank: axis {axis!r}: found no prompt; allowed: one or more for every axis")
        broken_N = ~self.features_NVD.flatten(1).isfinite().all(1)
        if broken_N.any():
            axis = self.axes[int(self.labels_N[broken_N][0])]
            raise UserError(
                f"bank: features: {int(broken_N.sum())} of {shape[0]} rows are not finite, the first of axis "
                f"{axis!r}; allowed: finite numbers"
            )

    def save(self, path: Path) -> None:
        """Write the bank as safetensors, whole or not at all. `OSError` names the file."""
        tensors = {"features_NVD": self.features_NVD, "labels_N": self.labels_N}
        files.write(path, FORMAT, tensors, {"axes": self.axes, "groups": self.groups_N, "about": self.about})

    @classmethod
    def load(
        cls, path: Path, *, axes: Sequence[str] | None = None, expected_about: dict[str, str] | None = None
    ) -> Bank:
        """Read a bank, and refuse one that was made for others where these are given.

        Raises:
            UserError: missing, damaged, of other axes (or in another order), of another base or other adapters.
        """
        tensors, facts = files.read(path, FORMAT, ("axes", "groups", "about"))
        found = tuple(facts["axes"])
        if axes is not None and found != tuple(axes):
            raise UserError(f"{path}: axes: found {', '.join(found)}; allowed: {', '.join(axes)}, in this order")
        if expected_about is not None:
            files.same_origin(path, "bank", facts["about"], expected_about)
        if tensors.keys() != {"features_NVD", "labels_N"}:
            raise UserError(f"{path}: found tensors {', '.join(sorted(tensors))}; allowed: features_NVD, labels_N")
        return cls(tensors["features_NVD"], tensors["labels_N"], facts["groups"], found, facts["about"])


def check_axes(axes: Sequence[str]) -> None:
    """Raises:
    UserError: fewer than two axes, or two of the same name.
    """
    if len(axes) < 2:
        raise UserError(f"axes: found {len(axes)} ({', '.join(axes) or 'none'}); allowed: two or more")
    twice = [axis for axis, times in Counter(axes).items() if times > 1]
    if twice:
        raise UserError(f"axes: found {twice[0]!r} twice; allowed: each name once")
