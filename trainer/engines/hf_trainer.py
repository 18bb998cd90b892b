"""What transformers' Trainer must be told, and what it gets wrong, under each engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trainer.moe.sharding import partitions


class EngineTrainer(Trainer):
    """A Trainer of models that were split before it saw them.

    Overrides a private method of transformers 5.23, which can go when that asks the model itself.
    """

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Accumulate without communication; the Trainer's own asks a configuration that only its own loading sets."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def engine_arguments() -> dict[str, Any]:
    """Keyword arguments for a trainer's arguments class."""
    return {
        "ddp_find_unused_parameters": False,  # the split touches every parameter in every batch
        "ddp_broadcast_buffers": False,  # buffers are constants
    }


def checkpointing_arguments(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for torch's activation checkpointing of this model."""
    # torch (2.13) saves a frozen parameter itself, which ZeRO-3 has emptied again when torch compares shapes after
    # recomputing; it is gathered when its turn in the backward pass comes.
    return {"determinism_check": "none"} if partitions(model) else {}


def release(trainer: Trainer) -> None:
    """Take the engine off the model, so that the next stage can set up its own."""
    if trainer.is_deepspeed_enabled:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        unset_hf_deepspeed_config()  # else every model that is loaded later is partitioned while it is made
    trainer.accelerator.free_memory()


def forget_arguments() -> None:
    """Undo what making a trainer's arguments leaves behind, which would partition every model that is loaded later."""
    unset_hf_deepspeed_config()
