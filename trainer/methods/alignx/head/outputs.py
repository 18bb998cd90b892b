"""What the output calibration is trained on: last hidden states of every axis' expert at reply positions, cached.

Shapes: T reply tokens, A axes, H last hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import UserError
from trainer.methods.alignx.head import files

FORMAT = "routealign-alignx-outputs-1"


@dataclass(frozen=True)
class Outputs:
    """`hidden_TAH`: states that the language-model head would read, of any float type. `targets_T`: int64, the token
    that follows. `row_T`: int64, the row of the bank whose prompt is answered. `about`: the bank's.

    Raises:
        UserError: sizes that do not fit together, no token, or states that are not finite.
    """

    hidden_TAH: Tensor
    targets_T: Tensor
    row_T: Tensor
    about: dict[str, str]

    def __post_init__(self) -> None:
        tokens = len(self.targets_T)
        if self.hidden_TAH.ndim != 3 or not tokens == len(self.hidden_TAH) == len(self.row_T) > 0:
            raise UserError(
                f"outputs: found states {list(self.hidden_TAH.shape)}, {tokens} targets and {len(self.row_T)} rows; "
                "allowed: [tokens, axes, hidden size], and as many targets and rows as tokens, one or more"
            )
        if {self.targets_T.dtype, self.row_T.dtype} != {torch.int64}:
            raise UserError("outputs: targets and rows: allowed: int64")
        broken = int((~self.hidden_TAH.flatten(1).isfinite().all(1)).sum())
        if broken:
            raise UserError(f"outputs: states of {broken} of {tokens} tokens are not finite; allowed: finite numbers")

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all. `OSError` names the file."""
        tensors = {"hidden_TAH": self.hidden_TAH, "targets_T": self.targets_T, "row_T": self.row_T}
        files.write(path, FORMAT, tensors, {"about": self.about})

    @classmethod
    def load(cls, path: Path, expected_about: dict[str, str]) -> Outputs:
        """Raises:
        UserError: missing, damaged, of another base or other adapters.
        """
        tensors, facts = files.read(path, FORMAT, ("about",))
        files.same_origin(path, "outputs", facts["about"], expected_about)
        names = {"hidden_TAH", "targets_T", "row_T"}
        if tensors.keys() != names:
            raise UserError(f"{path}: found tensors {', '.join(sorted(tensors))}; allowed: {', '.join(sorted(names))}")
        return cls(**tensors, about=facts["about"])
