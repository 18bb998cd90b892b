"""The MoCaE head: how much each axis' expert weighs on a prompt, and the calibration of the mixed output.

    f      = normalise(P (features - mean))             one shared P for every view
    alpha  = isotonic(softmax((W_r f + .6 fractal + .4 natural) / tau))

Source: arXiv 2602.07381 names the pieces; the equations are our reading (docs/alignx.md).

Shapes: B prompts, V views (base, then the A axes), D hidden size, K latent size, S positions, H last hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from trainer.methods.alignx.head import files
from trainer.methods.alignx.head.bank import check_axes
from trainer.methods.alignx.head.calibration import Isotonic
from trainer.methods.alignx.head.calibrators import Fractal, Natural
from trainer.methods.alignx.head.output import Output

FORMAT = "routealign-mocae-1"
ROUNDING = 1e-5
"""A centred state shorter than this share of the state before is rounding, and becomes 0."""


class Projection(nn.Module):
    """`P`: K orthonormal rows, drawn once and not trained: distances in the bank keep their meaning."""

    P_KD: Tensor
    mean_VD: Tensor

    def __init__(self, views: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("P_KD", torch.zeros(latent, hidden))
        self.register_buffer("mean_VD", torch.zeros(views, hidden))

    @classmethod
    def of(cls, features_NVD: Tensor, latent: int, generator: torch.Generator) -> Projection:
        """Centred on the bank: hidden states share a large part that tells no prompt from another."""
        _, views, hidden = features_NVD.shape
        made = cls(views, hidden, min(latent, hidden))
        nn.init.orthogonal_(made.P_KD, generator=generator)
        made.mean_VD.copy_(features_NVD.double().mean(0))
        return made

    def forward(self, features_BVD: Tensor) -> Tensor:
        """Projected views of length 1, or 0 where a state is the bank's mean: [B, V, K]."""
        features_BVD = features_BVD.float()
        f_BVK = (features_BVD - self.mean_VD) @ self.P_KD.T
        length_BV1 = f_BVK.norm(dim=2, keepdim=True)
        is_rounding_BV1 = length_BV1 <= ROUNDING * features_BVD.norm(dim=2, keepdim=True)
        return torch.where(is_rounding_BV1, torch.zeros_like(f_BVK), f_BVK / length_BV1.clamp_min(1e-30))


class MoCaE(nn.Module):
    """Mixture of Calibrated Experts. As built: every axis weighs the same, and the output is left as it is.

    `fractal`, `natural`, `isotonic`, `output`: pieces that `fit` and `fit_output` add where they earn their place.

    Raises:
        UserError: fewer than two axes, or two of the same name.
    """

    tau: Tensor

    def __init__(self, axes: tuple[str, ...], hidden: int, latent: int) -> None:
        super().__init__()
        check_axes(axes)
        self.axes = axes
        views, latent = 1 + len(axes), min(latent, hidden)
        self.projection = Projection(views, hidden, latent)
        self.W_r = nn.Parameter(torch.zeros(len(axes), views * latent))
        self.register_buffer("tau", torch.tensor(1.0))
        self.fractal: Fractal | None = None
        self.natural: Natural | None = None
        self.isotonic: Isotonic | None = None
        self.output: Output | None = None

    @torch.no_grad()
    def logits(self, features_BVD: Tensor) -> Tensor:
        """Before the temperature, [B, A].

        Raises:
            UserError: features that are not finite.
        """
        assert features_BVD.shape[1:] == self.projection.mean_VD.shape, "features are of another model or other axes"
        broken_B = ~features_BVD.flatten(1).isfinite().all(1)
        if broken_B.any():
            raise UserError(
                f"features: prompt {int(broken_B.nonzero()[0])} of {len(broken_B)} is not finite; "
                "allowed: finite numbers"
            )
        f_BVK = self.projection(features_BVD)
        logits_BA = f_BVK.flatten(1) @ self.W_r.T
        for calibrator in (self.fractal, self.natural):
            if calibrator is not None:
                logits_BA = logits_BA + calibrator(f_BVK)
        return logits_BA

    @torch.no_grad()
    def alpha(self, features_BVD: Tensor) -> Tensor:
        """Weights of the axes, [B, A] fp32, rows sum to 1. `UserError` for features that are not finite."""
        alpha_BA = (self.logits(features_BVD) / self.tau).softmax(1)
        return alpha_BA if self.isotonic is None else self.isotonic(alpha_BA)

    @torch.no_grad()
    def correct(self, hidden_BSH: Tensor) -> Tensor:
        """The mixed last hidden states, calibrated; in their own type."""
        return hidden_BSH if self.output is None else self.output(hidden_BSH)

    def save(self, path: Path, about: dict[str, str]) -> None:
        """Write the head as safetensors, whole or not at all. `about`: the bank's. `OSError` names the file."""
        files.write(path, FORMAT, self.state_dict(), {"axes": self.axes, "about": about})

    @classmethod
    def load(cls, path: Path, expected_about: dict[str, str]) -> MoCaE:
        """Read a head that was fitted for this base and these adapters.

        Raises:
            UserError: missing, damaged, or of another base or other adapters.
        """
        tensors, facts = files.read(path, FORMAT, ("axes", "about"))
        files.same_origin(path, "head", facts["about"], expected_about)
        try:
            head = cls._shaped(tuple(facts["axes"]), tensors)
            head.load_state_dict(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: not the tensors of a head: {' '.join(str(error).split())}") from error
        return head

    @classmethod
    def _shaped(cls, axes: tuple[str, ...], tensors: dict[str, Tensor]) -> MoCaE:
        """A head with the pieces and sizes that the tensors have."""
        latent, hidden = tensors["projection.P_KD"].shape
        head = cls(axes, hidden, latent)
        if "fractal.bank_NK" in tensors:
            head.fractal = Fractal(len(axes), latent, len(tensors["fractal.bank_NK"]))
        if "natural.prototype_AK" in tensors:
            head.natural = Natural(len(axes), latent)
        if "isotonic.x_AJ" in tensors:
            head.isotonic = Isotonic(len(axes), tensors["isotonic.x_AJ"].shape[1])
        if "output.n.weight" in tensors:
            head.output = Output(len(tensors["output.n.weight"]), len(tensors["output.three.weight"]))
        return head
