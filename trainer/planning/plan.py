"""`plan`: what a recipe needs under each engine, which engine to take, what to change where none fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from data_prep.errors import UserError
from trainer.engines.memory import ENGINES, SPLIT_WEIGHTS, Memory, host_memory, memory
from trainer.moe.backbone import Backbone
from trainer.planning import workload
from trainer.planning.parts import Parts, count, critical_counts, read_config, skeleton, under_repair
from trainer.planning.rehearsal import Shape, Stage, Transient, rehearse
from trainer.planning.sizes import OPTIMISERS, Held, measure
from trainer.planning.workload import ROWS, Steps, batch_rows, longest
from trainer.recipe.schema import Recipe

USABLE = 0.95
"""Share of a GPU that a run may fill; the rest goes to the runtime, communication and gaps between blocks."""
GB = 10**9


@dataclass(frozen=True)
class Choice:
    """An engine, and whether with activation checkpointing."""

    engine: str
    checkpointing: bool


@dataclass
class Plan:
    """Memory is that of one process at the peak of the whole run, in bytes. `gpus` and `host_memory` are per node."""

    recipe: Recipe
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
    def checkpointing(self) -> bool:
        """Whether the recipe's training stages use activation checkpointing."""
        return workload.checkpointing(self.recipe.repair) and workload.checkpointing(self.recipe.consistency)

    def stages(self, engine: str, checkpointing: bool | None = None) -> list[Memory]:
        """Every stage's peak in one process.

        Raises:
            UserError: an engine that there is not.
        """
        if engine not in ENGINES:
            raise UserError(f"engine: found {engine!r}; allowed: {', '.join(ENGINES)}")
        processes = 1 if engine == "single" else self.processes
        found = []
        for stage in workload.stages(self.recipe):
            section = getattr(self.recipe, stage) if stage in ROWS else None
            saves = accumulates = False
            if section is not None:
                saves = workload.checkpointing(section) if checkpointing is None else checkpointing
                accumulates = workload.argument(section, "gradient_accumulation_steps") > 1
            made = memory(
                engine,
                stage,
                self._held[stage],
                self._beside(stage, engine),
                self._step(stage, saves),
                processes,
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
        processes = 1 if engine == "single" else self.processes
        gpus = 1 if engine == "single" else self.gpus
        last = workload.stages(self.recipe)[-1]
        stock, copied = self._held["detect"].weights, self.recipe.repair.scope == "full"
        return host_memory(engine, stock, self._held[last], gpus, processes, copied=copied)

    @property
    def recommended(self) -> Choice | None:
        """The cheapest engine that fits; None: nothing does."""
        return self.recommend(self.gpu_memory_gb)

    def recommend(self, gpu_memory_gb: float | None) -> Choice | None:
        """The cheapest engine on GPUs of this size: checkpointing costs less time than splitting weights."""
        whole = [e for e in ENGINES if e not in SPLIT_WEIGHTS and (e == "single") == (self.processes == 1)]
        split = [e for e in SPLIT_WEIGHTS if self.processes > 1]
        for engines in (whole, [e for e in split if e != "zero3-offload"], ["zero3-offload"] if split else []):
            for checkpointing in sorted({self.checkpointing, True}):
                for engine in engines:
                    if self.fits(engine, checkpointing, gpu_memory_gb):
                        return Choice(engine, checkpointing)
        return None

    def advice(self, gpu_memory_gb: float | None = None) -> list[str]:
        """What to change where nothing fits, each with what it would save in the fullest stage."""
        engine = "single" if self.processes == 1 else "zero3"
        now = self.per_gpu(engine, True)
        size = gpu_memory_gb if gpu_memory_gb is not None else self.gpu_memory_gb
        found = []
        for change, recipe, changed in workload.smaller(self.recipe):
            known = {key: step for key, step in self._steps.items() if key[0] not in changed}
            less = replace(self, recipe=recipe, _steps=known).per_gpu(engine, True)
            if less.total < now.total:
                enough = "" if size is None or less.total > USABLE * size * GB else ", which fits"
                found.append(f"{change}: {less.total / GB:.1f} instead of {now.total / GB:.1f} GB{enough}")
        return [*found, "more GPUs: zero3 and fsdp2 split the weights over all of them"]

    def steps(self) -> list[Steps]:
        """Optimiser steps and tokens of the training stages, from the most pairs that detection may keep."""
        return workload.steps(self.recipe, self.processes)

    def json(self) -> dict[str, Any]:
        """Everything as plain values; sizes in bytes."""
        engines = {}
        for engine in ENGINES:
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

    def _beside(self, stage: str, engine: str) -> int:
        """Another model held meanwhile: the copy that full fine-tuning compares with, the stock model that a sharded
        run keeps beside the split one, the repaired model beside the random control, the reloaded one at export."""
        stock = self._held["detect"].weights
        if stage == "detect" or self.recipe.method == "steermoe":
            return 0
        full = self.recipe.repair.scope == "full"
        control = not full and self.recipe.evaluate.random_control
        reloaded = stage == "evaluate" and engine not in SPLIT_WEIGHTS
        return stock * (int(full) + int(control or reloaded or engine in SPLIT_WEIGHTS))

    @cached_property
    def _counts(self) -> list[int]:
        return critical_counts(self.recipe, Backbone.of(skeleton(self.recipe.model, self.config)))

    @cached_property
    def _held(self) -> dict[str, Held]:
        recipe = self.recipe
        model = skeleton(recipe.model, self.config)
        backbone = Backbone.of(model)
        found = {"detect": measure(backbone, recipe, None, None)}
        if recipe.detect.score == "saliency":
            asked = [*backbone.expert_parameters().values(), *backbone.shared_parameters().values()]
            gradients = sum(p.numel() * p.element_size() for p in asked)
            found["detect"] = replace(found["detect"], gradients=gradients)
        found["evaluate"] = found["detect"]
        if recipe.method == "steermoe":
            return found
        trained = under_repair(recipe, backbone, self._counts)
        trained.train_experts(routers=recipe.repair.train_gates)
        found["repair"] = measure(backbone, recipe, trained, recipe.repair)
        trained.train_routers()
        found["consistency"] = measure(backbone, recipe, trained, recipe.consistency)
        nothing = {"elements": 0, "gradients": 0, "states": 0, "states_fp32": 0}
        found["evaluate"] = replace(found["repair"], **nothing)
        return found

    def _step(self, stage: str, checkpointing: bool) -> Transient:
        if (stage, checkpointing) not in self._steps:
            recipe, length = self.recipe, longest(self.recipe)
            kind, name = checkpointing, cast(Stage, stage)
            if stage in ROWS:
                rows = batch_rows(recipe, stage)
                shape = Shape(rows, length, workload.retained_rows(recipe) if stage == "repair" else 0)
            elif stage == "detect" and recipe.detect.score == "saliency":
                shape, kind, name = Shape(recipe.detect.batch_size, length), False, "saliency"
            else:
                section = recipe.detect if stage == "detect" else recipe.evaluate
                rows = recipe.evaluate.batch_size  # which detection's replies are batched by, too
                shape, kind = Shape(rows, length + section.max_new_tokens), False
            step = rehearse(recipe, self.config, self._counts, name, shape, kind)
            if stage in ROWS and self._held[stage].dequantised:
                unit = self._held[stage].dequantised
                step = Transient(step.peak + unit, step.temporary + unit)
            self._steps[stage, checkpointing] = step
        return self._steps[stage, checkpointing]


def plan(
    recipe: Recipe,
    config: PreTrainedConfig | None = None,
    *,
    gpus: int,
    gpu_memory_gb: float | None = None,
    nodes: int = 1,
) -> Plan:
    """Plan a recipe from its model's configuration alone; no weights are read and no GPU is needed.

    Args:
        config: of the model; None: looked up as the recipe names it.
        gpus: per node.
        gpu_memory_gb: of one GPU, in 10^9 bytes; None: `Plan.fits` must be told.

    Raises:
        UserError: a configuration that cannot be found, a count below one, or a key of the recipe that leaves open
            how large a step is.
        ValueError: a model without MoE layers.
    """
    for option, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value < 1:
            raise UserError(f"{option}: found {value}; allowed: 1 or more")
    if gpu_memory_gb is not None and not gpu_memory_gb > 0:
        raise UserError(f"--gpu-memory: found {gpu_memory_gb}; allowed: the memory of one GPU in GB, such as 80")
    config = config or read_config(recipe.model)
    made = Plan(recipe, config, gpus, nodes, gpu_memory_gb, count(recipe, config))
    trained = {stage: made._held[stage].elements for stage in workload.stages(recipe) if stage in ROWS}
    made.parts = replace(made.parts, trainable=trained)
    longest(recipe)
    for stage in trained:
        optimiser = workload.optimiser(getattr(recipe, stage))
        if optimiser not in OPTIMISERS:
            made.notes.append(f"{stage}.optim: {optimiser} is not known here; reckoned like AdamW")
    return made


def machine() -> tuple[int, float | None]:
    """GPUs of this machine and the memory of the smallest in GB; one and None where there is none."""
    sizes = [torch.cuda.get_device_properties(i).total_memory / GB for i in range(torch.cuda.device_count())]
    return max(len(sizes), 1), min(sizes, default=None)
