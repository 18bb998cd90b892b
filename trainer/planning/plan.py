"""`plan`: what a recipe needs under each engine, which engine to take, what to change where none fits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from data_prep.errors import UserError
from trainer.engines.memory import (
    ENGINES,
    OFFLOADED,
    SPLIT_WEIGHTS,
    Memory,
    StageSizes,
    Transient,
    by_cost,
    host_memory,
    leanest,
    memory,
    processes_of,
)
from trainer.model.config import read_config
from trainer.moe.backbone import Backbone
from trainer.planning import workload
from trainer.planning.parts import Parts, count, on_meta
from trainer.planning.planned import Planned, PlannedStage
from trainer.planning.rehearsal import rehearse
from trainer.planning.sizes import OPTIMISERS, measure
from trainer.planning.workload import Steps
from trainer.recipe.schema import Recipe

USABLE = 0.95
"""Share of a GPU that a run may fill; the rest goes to the runtime, communication and gaps between blocks."""
GB = 10**9
MOST = 65_536
"""GPUs of a node, and nodes."""


@dataclass(frozen=True)
class Choice:
    """An engine, and whether with activation checkpointing."""

    engine: str
    checkpointing: bool


@dataclass
class Plan:
    """Memory is that of one process at the peak of the whole run, in bytes. `gpus` and `host_memory` are per node."""

    recipe: Recipe
    planned: Planned
    config: PreTrainedConfig
    gpus: int
    nodes: int
    gpu_memory_gb: float | None
    parts: Parts
    notes: list[str] = field(default_factory=list)
    _steps: dict[tuple[str, bool], Transient] = field(default_factory=dict, repr=False)

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that every stage of the run can have."""
        split = () if any(stage.needs_whole_model for stage in self._run) else SPLIT_WEIGHTS
        return tuple(engine for engine in ENGINES if engine in split or engine not in SPLIT_WEIGHTS)

    @property
    def checkpointing(self) -> bool:
        """Whether the recipe's training stages use activation checkpointing; False where nothing trains."""
        sections = [stage.training.section for stage in self._run if stage.training is not None]
        return bool(sections) and all(workload.checkpointing(section) for section in sections)

    @property
    def training(self) -> list[str]:
        """Names of the stages that train."""
        return [stage.name for stage in self._run if stage.training is not None]

    def stages(self, engine: str, checkpointing: bool | None = None) -> list[Memory]:
        """Every stage's peak in one process.

        Raises:
            UserError: an engine that there is not, or that a stage cannot have.
        """
        if engine not in self.engines:
            raise UserError(f"engine: found {engine!r}; allowed: {', '.join(self.engines)}")
        found = []
        for stage in self._run:
            saves = accumulates = False
            if stage.training is not None:
                section = stage.training.section
                saves = workload.checkpointing(section) if checkpointing is None else checkpointing
                accumulates = workload.argument(section, "gradient_accumulation_steps") > 1
            made = memory(
                engine,
                stage.name,
                self._sizes[stage.name],
                self._beside(stage, engine),
                self._step(stage, saves),
                processes_of(engine, self.processes),
                accumulates=accumulates,
                checkpointing=saves,
            )
            found.append(made)
        return found

    def per_gpu(self, engine: str, checkpointing: bool | None = None) -> Memory:
        """The fullest stage of one process. `checkpointing` None: as the recipe says."""
        return max(self.stages(engine, checkpointing), key=lambda found: found.total)

    def fits(self, engine: str, checkpointing: bool | None = None, gpu_memory_gb: float | None = None) -> bool:
        """Whether the fullest stage leaves `1 - USABLE` of a GPU free.

        Raises:
            UserError: no size of a GPU was given, here or to `plan`.
        """
        size = gpu_memory_gb if gpu_memory_gb is not None else self.gpu_memory_gb
        if size is None:
            raise UserError("--gpu-memory: not given; allowed: the memory of one GPU in GB, such as 80")
        return self.per_gpu(engine, checkpointing).total <= USABLE * size * GB

    def host_memory(self, engine: str) -> int:
        """Bytes that the processes of the first node need in its own memory."""
        gpus, processes = (processes_of(engine, number) for number in (self.gpus, self.processes))
        return host_memory(engine, self._stock.weights, self._sizes[self._run[-1].name], gpus, processes)

    @property
    def recommended(self) -> Choice | None:
        """The cheapest engine that fits; None: nothing does."""
        return self.recommend(self.gpu_memory_gb)

    def recommend(self, gpu_memory_gb: float | None) -> Choice | None:
        """The cheapest engine on GPUs of this size: checkpointing costs less time than splitting weights."""
        for engines in by_cost(self.processes):
            for checkpointing in sorted({self.checkpointing, True}):
                for engine in engines:
                    if engine in self.engines and self.fits(engine, checkpointing, gpu_memory_gb):
                        return Choice(engine, checkpointing)
        return None

    def advice(self, gpu_memory_gb: float | None = None) -> list[str]:
        """What to change where nothing fits, each with what it would save in the fullest stage."""
        engine = leanest(self.processes, self.engines)
        now = self.per_gpu(engine, True)
        size = gpu_memory_gb if gpu_memory_gb is not None else self.gpu_memory_gb
        found = []
        for saving in self.planned.savings():
            known = {key: step for key, step in self._steps.items() if key[0] not in saving.changed}
            less = replace(self, planned=saving.planned, _steps=known).per_gpu(engine, True)
            if less.total < now.total:
                enough = "" if size is None or less.total > USABLE * size * GB else ", which fits"
                found.append(f"{saving.words}: {less.total / GB:.1f} instead of {now.total / GB:.1f} GB{enough}")
        splitting = [name for name in SPLIT_WEIGHTS if name in self.engines and name not in OFFLOADED]
        more = f"more GPUs: {' and '.join(splitting)} split the weights over all of them"
        return [*found, more] if splitting else found

    def steps(self) -> list[Steps]:
        """Optimiser steps and tokens of the training stages, at most."""
        return workload.steps(self._run, self.processes)

    def json(self) -> dict[str, Any]:
        """Everything as plain values; sizes in bytes."""
        engines = {}
        for engine in self.engines:
            shown = {}
            for name, checkpointing in (("as_recipe", None), ("checkpointing", True), ("no_checkpointing", False)):
                found = self.per_gpu(engine, checkpointing)
                shown[name] = {"stage": found.stage, **found.parts(), "total": found.total}
                if self.gpu_memory_gb is not None:
                    shown[name]["fits"] = self.fits(engine, checkpointing)
            engines[engine] = {
                **shown,
                "stages": {found.stage: found.total for found in self.stages(engine)},
                "host_memory": self.host_memory(engine),
            }
        chosen = self.recommended if self.gpu_memory_gb is not None else None
        return {
            "model": self.recipe.model.name_or_path,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "gpu_memory_gb": self.gpu_memory_gb,
            "parameters": asdict(self.parts),
            "engines": engines,
            "recommended": asdict(chosen) if chosen else None,
            "steps": [asdict(found) for found in self.steps()],
            "notes": self.notes,
        }

    # --- what the stages hold ---------------------------------------------------------------------

    @cached_property
    def _run(self) -> list[PlannedStage]:
        return list(self.planned.stages())

    @cached_property
    def _stock(self) -> StageSizes:
        return measure(self._model(), self.recipe.model.quantization)

    @cached_property
    def _sizes(self) -> dict[str, StageSizes]:
        found = {}
        for stage in self._run:
            section = stage.training.section if stage.training is not None else None
            found[stage.name] = measure(stage.hold(self._model()), self.recipe.model.quantization, section)
        return found

    def _beside(self, stage: PlannedStage, engine: str) -> int:
        """Bytes of other models held meanwhile, before splitting."""
        copies = stage.copies_where_split if engine in SPLIT_WEIGHTS else stage.copies
        return self._sizes[stage.name].copied + copies * self._stock.weights

    def _step(self, stage: PlannedStage, checkpointing: bool) -> Transient:
        key = stage.name, checkpointing
        if key not in self._steps:
            step = rehearse(self._model, stage, checkpointing=checkpointing)
            unpacked = self._sizes[stage.name].dequantised if stage.training is not None else 0
            self._steps[key] = Transient(step.peak + unpacked, step.temporary + unpacked)
        return self._steps[key]

    def _model(self) -> Backbone:
        return on_meta(self.recipe.model, self.config, takes_dense=self.recipe.takes_dense)


def plan(
    recipe: Recipe,
    planned: Planned,
    config: PreTrainedConfig | None = None,
    *,
    gpus: int,
    gpu_memory_gb: float | None = None,
    nodes: int = 1,
) -> Plan:
    """Plan a recipe from its model's configuration alone; no weights are read and no GPU is needed.

    Args:
        planned: the run, as the recipe's method has it (`Method.planned`).
        config: of the model; None: looked up as the recipe names it.
        gpus: per node.
        gpu_memory_gb: of one GPU, in 10^9 bytes; None: `Plan.fits` must be told.

    Raises:
        UserError: a configuration that cannot be found, a count below one, a key of the recipe that leaves open
            how large a step is, or one that asks for what the model does not have.
        ValueError: a model without MoE layers.
    """
    for option, value in (("--gpus", gpus), ("--nodes", nodes)):
        if not 1 <= value <= MOST:
            raise UserError(f"{option}: found {value}; allowed: 1 to {MOST:,}")
    if gpu_memory_gb is not None and not 0 < gpu_memory_gb < math.inf:
        raise UserError(f"--gpu-memory: found {gpu_memory_gb}; allowed: the memory of one GPU in GB, such as 80")
    named = recipe.model
    config = config or read_config(
        named.name_or_path, revision=named.revision, trust_remote_code=named.trust_remote_code
    )
    parts = count(recipe.model, config, planned.footprint, takes_dense=recipe.takes_dense)
    made = Plan(recipe, planned, config, gpus, nodes, gpu_memory_gb, parts)
    made.parts = replace(parts, trainable={name: made._sizes[name].elements for name in made.training})
    for stage in made._run:
        optimiser = workload.optimiser(stage.training.section) if stage.training is not None else None
        if optimiser is not None and optimiser not in OPTIMISERS:
            made.notes.append(f"{stage.name}.optim: {optimiser} is not known here; reckoned like AdamW")
    return made


def machine() -> tuple[int, float | None]:
    """GPUs of this machine and the memory of the smallest in GB; one and None where there is none."""
    sizes = [torch.cuda.get_device_properties(i).total_memory / GB for i in range(torch.cuda.device_count())]
    return max(len(sizes), 1), min(sizes, default=None)
