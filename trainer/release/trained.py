"""What was trained, remembered from before it is fused and written, and found again in the exported checkpoint.

Nothing of the way in between is asked: not `fuse`, not the export. Each expert is looked up in the reloaded checkpoint
by its own number, so a swapped or shifted expert is found even where all of them may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.model.config import read_config
from trainer.model.load import skeleton
from trainer.model.weight_files import CheckpointFiles, digest
from trainer.moe.trainable import TrainableModel
from trainer.release.places import targets_of

Part = tuple[str, int | None]
"""A parameter of the stock model, whole or the row of one expert."""

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Trained:
    """`digests`: part -> hash of its bytes. `merged`: part -> the tensor itself, where LoRA was merged: two ways of
    adding up differ in the last bit.

    `types`: parameter -> the narrowest type that it takes on its way to the files; both sides are rounded to it.
    """

    types: Mapping[str, torch.dtype]
    digests: dict[Part, str] = field(default_factory=dict)
    merged: dict[Part, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: TrainableModel, base: Path, *, keep: bool) -> Trained:
        """Read a model that is not fused yet. Collective; `keep` where this process will ask.

        One expert or one whole tensor is in memory at a time, besides the merged experts of a LoRA on the CPU.

        Args:
            base: the checkpoint that the export will be written like.
        """
        found = cls(_narrowest(base) if keep else {})
        lora = getattr(model, "lora_rank", None) is not None
        for name, expert, value in model.trained_state():
            if not keep:
                continue
            value = _narrowed(value, found.types.get(name)).cpu()
            if lora and expert is not None:
                found.merged[name, expert] = value.clone()
            else:
                found.digests[name, expert] = digest(value)
        return found

    def lost(self, reloaded: PreTrainedModel) -> list[str]:
        """The parts that an exported checkpoint does not hold as they were trained, as text."""
        held = dict(reloaded.named_parameters(remove_duplicate=False))
        parts = [*self.digests, *self.merged]
        return [_text(part) for part in parts if not self._same(part, held[part[0]].detach())]

    def _same(self, part: Part, parameter: Tensor) -> bool:
        name, expert = part
        found = _narrowed(parameter if expert is None else parameter[expert], self.types.get(name)).cpu()
        if part in self.digests:
            return digest(found) == self.digests[part]
        wanted = self.merged[part].float()
        last_bit = torch.finfo(found.dtype).eps * wanted.abs()
        adding_up = 32 * torch.finfo(torch.float32).eps * wanted.abs().max()
        return bool(((found.float() - wanted).abs() <= last_bit + adding_up).all())


def _narrowed(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None else value.to(dtype)


def _narrowest(base: Path) -> dict[str, torch.dtype]:
    """Parameter of the stock model -> the narrowest floating-point type that the base stores a part of it in."""
    found: dict[str, torch.dtype] = {}
    with CheckpointFiles(base) as files:
        for name, (targets, _) in targets_of(skeleton(read_config(base)), files.file_of).items():
            dtype = _TYPES.get(files.dtype(name), torch.float64)
            for target in targets:
                found[target] = min(dtype, found.get(target, torch.float64), key=lambda one: torch.finfo(one).bits)
    return found


def _text(part: Part) -> str:
    name, expert = part
    return name if expert is None else f"{name}[{expert}]"
