"""Evaluation mode and training mode of a model's modules, kept apart from whether it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back to its own former mode afterwards (also after an error)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def draw_nothing(model: nn.Module) -> None:
    """Take chance out of a model that trains: no router draws its experts or jitters its input, nothing is dropped.

    phimoe's sparsemixer and the jitter of mixtral, phimoe and minimax_m2 act in training mode only. Decoder layers
    themselves stay in it where they are, since checkpointing recomputes no others, and so does the outermost module,
    which trainers ask what they are doing.
    """
    stays = [m for m in model.modules() if m.training and (m is model or isinstance(m, GradientCheckpointingLayer))]
    model.eval()
    for module in stays:
        module.training = True
