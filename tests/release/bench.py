"""A tiny repaired model up to its export: what `export_and_audit` asks of an experiment, and nothing that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from data_prep.schema import Conversation, Prompt
from tests.tiny import tiny_tokenizer
from trainer.model.chat import Chat
from trainer.model.load import read_model
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.moe.footprint import Footprint
from trainer.pipeline.publish import export_and_audit, stock_of
from trainer.recipe.sections import ExportSection


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads only wait for each other on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Bench:
    """`folder`: where `model/`, `audit.json` and the patch are written."""

    base: Path
    folder: Path
    backbone: Backbone
    experts: ExpertSet
    trained: SplitModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(
        cls,
        base: Path,
        *,
        dtype: torch.dtype | str = "auto",
        lora_rank: int | None = None,
        shared: bool = False,
        train: bool = True,
        routers: bool = False,
    ) -> Bench:
        """A split model whose critical experts (two of the first MoE layer, one of the last) were moved."""
        backbone = Backbone.of(read_model(base, dtype)).check()
        first, last = backbone.layers[0], backbone.layers[-1]
        sizes = {layer.index: layer.num_experts for layer in backbone}
        experts = ExpertSet((Member(first.index, 1), Member(first.index, 5), Member(last.index, 2)), sizes)
        if shared:
            experts = experts.with_shared({first.index})
        split = SplitModel(backbone, experts, lora_rank=lora_rank)
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in [
                *(split.trainable().values() if train else ()),
                *(backbone.router_parameters().values() if routers else ()),
            ]:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        return cls(base, base.parent / "run", backbone, experts, split, tiny_tokenizer())

    def footprint(self, *, routers: bool = False) -> Footprint:
        of_experts = Footprint.of_experts(self.backbone, self.experts)
        return of_experts | Footprint.of_routers(self.backbone) if routers else of_experts

    def export(self, *, routers: bool = False, **section: Any) -> dict[str, Any]:
        """Write, audit and patch; returns the audit."""
        self.folder.mkdir(exist_ok=True)
        recipe = SimpleNamespace(
            model=SimpleNamespace(name_or_path=str(self.base), revision=None),
            run=SimpleNamespace(seed=0),
            hash=lambda: "0" * 64,
        )
        prompts = [Prompt(f"g:{i}", Conversation.of(f"w{i} w{i + 1} w{i + 2}"), "harmful") for i in range(40)]
        experiment: Any = SimpleNamespace(
            recipe=recipe,
            folder=self.folder,
            model=self.trained.model,
            chat=Chat(self.tokenizer),
            corpus=SimpleNamespace(harmful=SimpleNamespace(train=prompts)),
            versions={},
            step=_step,
        )
        return export_and_audit(
            experiment,
            ExportSection(**section),
            lambda: stock_of(experiment, self.trained, None),
            self.footprint(routers=routers),
            [],
            self.experts,
            trained=self.trained,
        )


def _step(_name: str, make: Callable[[], Any], kept: Any, **_: object) -> Any:
    kept.write(make())
    return SimpleNamespace(value=kept.read())
