"""What a run of AlignX holds, trains and may change, for the planner; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.config import parse_slice
from data_prep.errors import UserError
from trainer.methods.alignx.adapters import Adapter, AxisAdapters
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.methods.alignx.stages import JOINT
from trainer.moe.backbone import Backbone
from trainer.moe.footprint import Footprint
from trainer.planning import steps
from trainer.planning.planned import Planned, PlannedStage, Saving, Step, Training
from trainer.planning.savings import fewer_prompts, single_rows
from trainer.planning.workload import batch_rows


def planned(recipe: AlignxRecipe) -> Planned:
    return AlignxPlanned(recipe)


@dataclass(frozen=True)
class AlignxPlanned:
    """`planned.Planned` of an AlignX recipe."""

    recipe: AlignxRecipe

    def stages(self) -> list[PlannedStage]:
        recipe, section, length = self.recipe, self.recipe.adapters, self._length
        names = [*recipe.names, *([JOINT] if recipe.evaluate.baselines else [])]

        def hold(backbone: Backbone) -> Backbone:
            adapters = AxisAdapters(backbone, names, section, recipe.run.seed)
            first = Adapter(adapters, names[0])
            adapters.model.requires_grad_(False)
            for layer in adapters.layers.values():
                layer.set_adapter([first.name], inference_mode=True)
            for parameter in adapters.parameters(first.name).values():
                parameter.requires_grad_(True)
            return backbone

        def all_act(backbone: Backbone) -> Backbone:
            adapters = AxisAdapters(backbone, names, section, recipe.run.seed)
            for layer in adapters.layers.values():
                layer.set_adapter(list(recipe.names), inference_mode=True)
            return backbone

        # Every axis trains on its own rows; the baseline on all of them again.
        rounds = len(section.passes) * (2 if recipe.evaluate.baselines else 1)
        training = Training(section, self._rows(), length, rounds=rounds)
        step = _pass(batch_rows(section), length)
        trains = PlannedStage("adapters", step, hold, training, needs_whole_model=True)
        asked = steps.replies(recipe.evaluate.batch_size, length + recipe.evaluate.max_new_tokens)
        return [trains, PlannedStage("evaluate", asked, all_act, copies=1, copies_where_split=1)]

    def footprint(self, backbone: Backbone) -> Footprint:
        """None: adapters lie beside the model."""
        return Footprint()

    def savings(self) -> Iterator[Saving]:
        for words, recipe, changed in (
            *single_rows(self.recipe, ["adapters"]),
            *fewer_prompts(self.recipe, ("evaluate",)),
        ):
            yield Saving(words, AlignxPlanned(recipe), changed)

    @property
    def _length(self) -> int:
        length = self.recipe.adapters.trainer_arguments["max_length"]
        if length is None:
            raise UserError("adapters.max_length: found null; a plan needs the length of the longest row, such as 512")
        return int(length)

    def _rows(self) -> int:
        """Training rows of all axes, where the recipe says how many; slices without an end count as their start."""
        total = 0
        for axis in self.recipe.axes:
            rows = axis.data.train
            if isinstance(rows, int):
                total += rows
            else:
                chosen = parse_slice(rows)
                total += len(range(*chosen.indices(chosen.stop or chosen.start or 1)))
        return total


def _pass(rows: int, length: int) -> Step:
    """`passes.AdapterTrainer.compute_loss` on rows that are responses from their first token on."""

    def step(held: Any) -> Tensor:
        held.model.train()
        ids_BS = torch.zeros(rows, length, dtype=torch.long)
        logits_BSV = held.model(
            input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False, logits_to_keep=length
        ).logits
        loss: Tensor = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2).float(), ids_BS[:, 1:])
        return loss

    return step
