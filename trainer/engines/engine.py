"""The engine that a launcher chose, and how it holds a model: whole in every process, or split over them.

`accelerate launch --config_file ds_configs/<engine>.yaml` says it in the environment, as launch.sh does on CPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from data_prep.errors import UserError
from trainer.model.load import hollow, load, read_tokenizer
from trainer.moe.backbone import Backbone
from trainer.moe.scoring import Scoring
from trainer.moe.sharding import shard_fsdp2, shard_zero3, spread
from trainer.recipe.sections import ModelSection
from trainer.runtime.processes import from_rank_0, rank, world_size

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

    def load(self, section: ModelSection) -> tuple[Backbone, PreTrainedTokenizerBase]:
        """The model that a recipe names, its contract checked, to be split into experts and then over the processes.

        Where the engine splits it, it lies on the CPU, and rank 0 alone reads the weights: the other processes hold
        memory that was never written until `shard` fills their parts. Routers, shared experts and buffers, of which
        originals are kept, are real everywhere. Collective.

        Raises:
            UserError, ValueError, OSError: as `loading.load` and `Backbone.check`, on every process.
        """
        if not self.shards:
            model, tokenizer = load(section, PartialState().device)
            return Backbone.of(model).check(), tokenizer
        return _read_on_rank_0(section)

    def shard(self, backbone: Backbone) -> None:
        """Split rank 0's model over the processes, where the engine does that."""
        if self.name == "zero3":
            shard_zero3(backbone, self.zero_config, PartialState().device)
        elif self.name == "fsdp2":
            shard_fsdp2(backbone, PartialState().device)


@dataclass(frozen=True)
class _Known:
    """What rank 0 tells the others about the model that it read."""

    dtypes: dict[str, torch.dtype]
    scorings: list[Scoring | None]
    generation_config: Any


def _read_on_rank_0(section: ModelSection) -> tuple[Backbone, PreTrainedTokenizerBase]:
    if rank() == 0:
        try:
            model, tokenizer = load(section, torch.device("cpu"))
            backbone = Backbone.of(model).check()
        except Exception as error:  # told to the others, which wait for it
            from_rank_0(str(error) or type(error).__name__)
            raise
        from_rank_0(_known(backbone))
    else:
        known: _Known | str = from_rank_0("")
        if isinstance(known, str):
            raise UserError(known)
        tokenizer = read_tokenizer(section)
        model = hollow(section, known.dtypes)
        model.generation_config = known.generation_config
        backbone = Backbone.of(model).adopt(known.scorings)
    routers = [parameter for router in backbone.routers().values() for parameter in router.parameters()]
    spread([*routers, *backbone.shared_parameters().values(), *model.buffers()], PartialState().device)
    return backbone, tokenizer


def _known(backbone: Backbone) -> _Known:
    model = backbone.model
    dtypes = {name: held.dtype for name, held in (*model.named_parameters(), *model.named_buffers())}
    scorings = [None if layer.scoring is None else replace(layer.scoring, factor_E=None) for layer in backbone]
    return _Known(dtypes, scorings, model.generation_config)


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
