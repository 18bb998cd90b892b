"""Output calibration: what is added to the mixed last hidden state y before the language-model head.

    y' = y + tanh(W_n y + b) + W_4 relu(W_3 y)

W_n, b and W_4 start at zero, so that an untrained calibration is the identity.

Shapes: B prompts, S positions, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Output(nn.Module):
    """Computes in fp32 and returns the type it was given."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.n = nn.Linear(hidden, hidden)
        self.three = nn.Linear(hidden, width, bias=False)
        self.four = nn.Linear(width, hidden, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def drawn(cls, hidden: int, width: int, generator: torch.Generator) -> Output:
        """To be trained: still the identity, but with a W_3 that lets W_4 learn."""
        made = cls(hidden, width)
        nn.init.normal_(made.three.weight, std=hidden**-0.5, generator=generator)
        return made

    def forward(self, y_BSH: Tensor) -> Tensor:
        y32_BSH = y_BSH.float()
        return (y32_BSH + self.n(y32_BSH).tanh() + self.four(self.three(y32_BSH).relu())).to(y_BSH.dtype)
