"""The engine that a launcher chose, and how it loads a model: whole in every process, or split over them.

`accelerate launch --config_file ds_configs/<engine>.yaml` says it in the environment, as launch.sh does on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.errors import UserError
from trainer.engines.extensions import say_what_is_waited_for
from trainer.engines.launch_config import no_deepspeed
from trainer.engines.table import TABLE, Capabilities, names
from trainer.model.load import hollow, load
from trainer.model.tokenizer import read_tokenizer
from trainer.moe.backbone import Backbone
from trainer.moe.scoring import Scoring
from trainer.moe.sharding import shard_fsdp2, shard_zero3, spread
from trainer.recipe.sections import ModelSection
from trainer.runtime.processes import from_rank_0, rank, world_size


@dataclass(frozen=True)
class Engine:
    """`zero_config`: the `zero_optimization` part of the DeepSpeed configuration, without "auto"."""

    name: str
    zero_config: dict[str, Any] = field(default_factory=dict)

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return TABLE[self.name]

    def load(self, section: ModelSection, *, takes_dense: bool = False) -> tuple[Backbone, PreTrainedTokenizerBase]:
        """The model that a recipe names, its contract checked, to be split into experts and then over the processes.

        Where the engine splits it, it lies on the CPU, and rank 0 alone reads the weights: the other processes hold
        memory that was never written until `shard` fills their parts. Routers, shared experts and buffers, of which
        originals are kept, are real everywhere. Collective.

        Raises:
            UserError, ValueError, OSError: as `loading.load` and `Backbone.check`, on every process.
        """
        if not self.capabilities.splits_parameters:
            model, tokenizer = load(section, PartialState().device)
            return Backbone.of(model, takes_dense=takes_dense).check(), tokenizer
        return _read_on_rank_0(section, takes_dense)

    def make_real(self, parameters: Iterable[Tensor]) -> None:
        """Fill parameters of a loaded model on every process, where only rank 0 read them. Collective."""
        if self.capabilities.splits_parameters:
            spread((parameter.data for parameter in parameters), PartialState().device)

    def shard(self, backbone: Backbone) -> None:
        """Split rank 0's model over the processes, where the engine does that."""
        if not self.capabilities.splits_parameters:
            return
        if self.capabilities.deepspeed_stage is None:
            shard_fsdp2(backbone, PartialState().device)
        else:
            shard_zero3(backbone, self.zero_config, PartialState().device)


@dataclass(frozen=True)
class _Known:
    """What rank 0 tells the others about the model that it read."""

    dtypes: dict[str, torch.dtype]
    scorings: list[Scoring | None]
    generation_config: Any


def _read_on_rank_0(section: ModelSection, takes_dense: bool) -> tuple[Backbone, PreTrainedTokenizerBase]:
    if rank() == 0:
        try:
            model, tokenizer = load(section, torch.device("cpu"))
            backbone = Backbone.of(model, takes_dense=takes_dense).check()
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
        backbone = Backbone.of(model, takes_dense=takes_dense).adopt(known.scorings)
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
        raise no_deepspeed() from None
    from accelerate.utils import DeepSpeedPlugin

    say_what_is_waited_for()
    plugin = DeepSpeedPlugin()
    given: dict[str, Any] = plugin.deepspeed_config["zero_optimization"]
    stage = given.get("stage")
    offloads = (given.get("offload_param") or {}).get("device", "none") != "none"
    if stage not in (1, 2, 3):
        raise UserError(f"zero_optimization.stage: found {stage!r}; allowed: 1, 2, 3, or --engine ddp for none")
    found = names(lambda e: e.deepspeed_stage == stage and e.offloads == offloads)
    found = found or names(lambda e: e.deepspeed_stage == stage)
    return Engine(found[0], {key: value for key, value in given.items() if value != "auto"})
