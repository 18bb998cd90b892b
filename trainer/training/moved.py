"""Whether training moved what it trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.moe.sharding import local
from trainer.runtime.processes import from_all_ranks, rank


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Name -> digest of the bytes of every parameter that trains, of this process's part of it."""
    return {name: _digest(local(p)) for name, p in model.named_parameters() if p.requires_grad}


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(held.data, digest_size=16).hexdigest()


def moved(model: nn.Module, before: dict[str, str]) -> set[str]:
    """Names of the parameters of `before` that differ now on any process. Collective."""
    mine = [name for name, digest in fingerprints(model).items() if digest != before[name]]
    everywhere: Iterable[list[str]] = from_all_ranks({rank(): mine})
    return {name for names in everywhere for name in names}
