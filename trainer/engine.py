"""The engine that a launcher chose, and how it holds a model: whole in every process, or split over them.

`accelerate launch --config_file ds_configs/<engine>.yaml` says it in the environment, as launch.sh does on CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from accelerate import PartialState

from data_prep.errors import UserError
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import shard_fsdp2, shard_zero3
from trainer.run_process import from_rank_0, world_size

Name = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Engine:
    """`zero_config`: the `zero_optimization` part of the DeepSpeed configuration, without "auto"."""

    name: Name
    zero_config: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> bool:
        """Whether a model is split over the processes, so that a forward pass needs all of them."""
        return self.name in ("zero3", "fsdp2")

    @property
    def load_device(self) -> torch.device:
        """Where a model is loaded to: a model that will be split never lies whole on one GPU."""
        return torch.device("cpu") if self.shards else PartialState().device

    def shard(self, backbone: Backbone) -> None:
        """Split a whole model over the processes, where the engine does that."""
        if self.name == "zero3":
            shard_zero3(backbone, self.zero_config, PartialState().device)
        elif self.name == "fsdp2":
            shard_fsdp2(backbone, PartialState().device)


@cache
def engine() -> Engine:
    """The engine of this process.

    Raises:
        UserError: FSDP version 1, DeepSpeed that is not installed, or a DeepSpeed stage other than 1, 2, 3.
    """
    from_rank_0(None)  # makes the process group
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return _deepspeed()
    # The model is split here, so accelerate must not: on CPUs it would fall back to DDP without a word.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false") == "true":
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(f"fsdp_version: found {version}; allowed: 2 (ds_configs/fsdp2.yaml)")
        if world_size() == 1:
            raise UserError("fsdp2: found one process; needs two or more, or --engine single")
        return Engine("fsdp2")
    return Engine("single" if world_size() == 1 else "ddp")


def _deepspeed() -> Engine:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError("deepspeed: not installed; pip install 'routealign[gpu]', or --engine fsdp2") from None
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    given: dict[str, Any] = plugin.deepspeed_config["zero_optimization"]
    names: dict[int, Name] = {1: "zero1", 2: "zero2", 3: "zero3"}
    stage = given.get("stage")
    if stage not in names:
        raise UserError(f"zero_optimization.stage: found {stage!r}; allowed: 1, 2, 3, or --engine ddp for none")
    return Engine(names[stage], {key: value for key, value in given.items() if value != "auto"})
