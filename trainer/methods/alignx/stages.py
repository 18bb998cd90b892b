"""AlignX, stage 1 in a run folder: a resumable step per axis and pass, measured on every axis after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.methods.alignx.adapters import Adapter, AxisAdapters
from trainer.methods.alignx.axes import Axis
from trainer.methods.alignx.evaluate import measure_axes
from trainer.methods.alignx.passes import AxisRow, train_adapter
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.pipeline.experiment import Experiment, Step
from trainer.pipeline.train import train_step
from trainer.training.loop import StageResult

JOINT = "joint"
"""The adapter of the baseline: one for all axes, on the same rows, in as many steps."""
READS = ["axes", "adapters"]


@dataclass
class Stages:
    """`done`: name of a pass' step -> it. `rates`: name of a step -> R of every axis after it."""

    experiment: Experiment[AlignxRecipe]
    axes: list[Axis]
    adapters: AxisAdapters
    done: dict[str, Step[Any]] = field(default_factory=dict)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    """Adapter -> its last step."""

    @classmethod
    def of(cls, experiment: Experiment[AlignxRecipe], axes: list[Axis]) -> Stages:
        """The model of the experiment, with an adapter for every axis and, for the baseline, one for all."""
        recipe = experiment.recipe
        names = [*recipe.names, *([JOINT] if recipe.evaluate.baselines else [])]
        return cls(experiment, axes, AxisAdapters(experiment.backbone, names, recipe.adapters, recipe.run.seed))

    def train(self, *, measured: bool = True) -> None:
        """Every axis in turn, every pass; what was done before is taken up."""
        chained = self.experiment.recipe.adapters.order == "chain"
        for number, axis in enumerate(self.axes):
            before = self.axes[number - 1].name if chained and number else None
            for pass_ in self.experiment.recipe.adapters.passes:
                self._pass(axis.name, pass_, axis.trained(pass_), before)
                if measured:
                    self._measure(axis.name, f"{axis.name}-{pass_}")

    def train_joint(self) -> None:
        """The baseline: the rows of all axes together, pass by pass."""
        for pass_ in self.experiment.recipe.adapters.passes:
            rows = [row for axis in self.axes for row in axis.trained(pass_)]
            self._pass(JOINT, pass_, rows, None, steps_times=len(self.axes))
        self._measure(JOINT, JOINT)

    def ended(self, names: Sequence[str]) -> list[Step[Any]]:
        """The last step of each of these adapters."""
        return [self.done[self.last[name]] for name in names]

    def _pass(self, name: str, pass_: str, rows: list[AxisRow], before: str | None, steps_times: int = 1) -> None:
        recipe, adapter = self.experiment.recipe, Adapter(self.adapters, name)
        starts = name not in self.last

        def train(folder: Path, identity: str) -> StageResult:
            if starts and before is not None:
                adapter.load_state_dict(Adapter(self.adapters, before).state_dict())
            return train_adapter(
                adapter,
                self.experiment.chat,
                rows,
                recipe.adapters,
                folder,
                recipe.run.seed,
                identity,
                steps_times,
            )

        step = f"{name}-{pass_}"
        after = self.ended([name]) if not starts else self.ended([before]) if before is not None else []
        number = len(self.done) + 1
        self.done[step] = train_step(self.experiment, step, number, adapter, train, reads=READS, after=after)
        self.last[name] = step

    def _measure(self, adapter: str, label: str) -> None:
        found = measure_axes(
            self.experiment,
            self.axes,
            label,
            self.ended([adapter]),
            under=lambda: self.adapters.acting(adapter),
        )
        self.rates[label] = found.value["rates"]
