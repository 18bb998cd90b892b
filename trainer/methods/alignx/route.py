"""AlignX, stage 2 in a run folder: features cached once, the head fitted from them, the router measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from trainer.evaluation.generation import left_pad
from trainer.methods.alignx.adapters import AxisAdapters
from trainer.methods.alignx.axes import Axis, groups_of
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.head.ablation import ablation
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.calibration import accuracy, brier_B, ece
from trainer.methods.alignx.head.fit import fit, fit_output
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.head.outputs import Outputs
from trainer.methods.alignx.passes import AxisRow
from trainer.methods.alignx.recipe import AlignxRecipe, FeaturesSection
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.pipeline.experiment import Experiment, JsonFile, Kept, Step
from trainer.runtime.processes import dealt, from_all_ranks

REPLY_ROWS = 64
"""Training rows of each axis whose reply tokens the output calibration is trained on: their states are large."""


def about(adapters: AxisAdapters, axes: Sequence[str], section: FeaturesSection) -> dict[str, str]:
    """What features and head were made with: digests of base and adapters, layer, position. Collective."""
    layer = "last" if section.layer is None else str(section.layer)
    digests = {f"adapter {axis}": adapters.digest(axis) for axis in axes}
    return {"base": adapters.base_digest(), **digests, "layer": layer, "position": section.position}


@dataclass(frozen=True)
class Cached:
    """`bank`: features of every training prompt. `outputs`: states at reply tokens of some; None: not asked for."""

    bank: Bank
    outputs: Outputs | None


def cache(
    experiment: Experiment[AlignxRecipe], axes: Sequence[Axis], views: Views, after: Sequence[Step[Any]]
) -> Step[Cached]:
    """The step `features`: `bank.safetensors` and, for the output calibration, `outputs.safetensors`."""
    recipe, path = experiment.recipe, experiment.folder / "bank.safetensors"
    states, wanted = experiment.folder / "outputs.safetensors", recipe.head.output != "off"
    made_with = about(views.adapters, recipe.names, recipe.features)

    def make() -> Cached:
        prompts = [prompt.conversation for axis in axes for prompt in axis.rows.train]
        labels_N = torch.tensor([number for number, axis in enumerate(axes) for _ in axis.rows.train])
        features_NVD = views.of_prompts(experiment.chat, prompts, "features")
        bank = Bank(features_NVD, labels_N, groups_of(axes), recipe.names, made_with)
        return Cached(bank, _outputs(experiment.chat, axes, views, made_with) if wanted else None)

    def write(made: Cached) -> None:
        made.bank.save(path)
        if made.outputs is not None:
            made.outputs.save(states)

    def read() -> Cached:
        bank = Bank.load(path, axes=recipe.names, expected_about=made_with)
        return Cached(bank, Outputs.load(states, made_with) if wanted else None)

    kept = Kept(write, lambda: [path, *([states] if wanted else [])], read)
    return experiment.step("features", make, kept, reads=["axes", "adapters", "features", "head.output"], after=after)


def head(experiment: Experiment[AlignxRecipe], views: Views, cached: Step[Cached]) -> Step[MoCaE]:
    """The step `head`: `head.safetensors`, and `head.json` with what held-out rows of the bank say of it."""
    recipe, bank = experiment.recipe, cached.value.bank
    path, figures = experiment.folder / "head.safetensors", experiment.folder / "head.json"

    def make() -> tuple[MoCaE, dict[str, Any]]:
        fitted = fit(bank, recipe.head, recipe.run.seed)
        found: dict[str, Any] = {"figures": fitted.figures, "dropped": fitted.dropped, "evidence": fitted.evidence}
        if cached.value.outputs is not None:
            weight_VH = cast(Any, views.adapters.model).get_output_embeddings().weight.detach().cpu()
            output = fit_output(fitted.head, bank, cached.value.outputs, weight_VH, recipe.head, recipe.run.seed)
            if output is not None:
                found["evidence"]["output"] = output.as_dict()
                if not output.kept:
                    found["dropped"]["output"] = output.reason
        if recipe.evaluate.baselines:
            found["ablation"] = ablation(bank, recipe.head, recipe.run.seed)
        return fitted.head, found

    def write(made: tuple[MoCaE, dict[str, Any]]) -> None:
        made[0].save(path, bank.about)
        JsonFile(figures).write(made[1])

    def read() -> MoCaE:
        return MoCaE.load(path, bank.about).to(views.adapters.model.device)

    reads = ["head", "evaluate.baselines"]
    return experiment.step("head", make, Kept(write, lambda: [path, figures], read), reads=reads, after=[cached])


def on_test_prompts(
    experiment: Experiment[AlignxRecipe], axes: Sequence[Axis], views: Views, routed: Step[MoCaE]
) -> Step[dict[str, Any]]:
    """The step `router`: the router on the axes' test prompts, which neither adapters nor head were fitted on.

    {"accuracy", "ece_before", "ece_after", "brier", "n"}: before and after temperature and isotonic maps; and "right",
    prompt by prompt.
    """

    def make() -> dict[str, Any]:
        prompts = [prompt.conversation for axis in axes for prompt in axis.rows.test]
        labels_N = torch.tensor([number for number, axis in enumerate(axes) for _ in axis.rows.test])
        features_NVD = views.of_prompts(experiment.chat, prompts, "features of test prompts")
        own = routed.value.cpu()
        alpha_NA, raw_NA = own.alpha(features_NVD), own.logits(features_NVD).softmax(-1)
        own.to(views.adapters.model.device)
        confused_AA = one_hot(labels_N, len(axes)).float().T @ one_hot(alpha_NA.argmax(-1), len(axes)).float()
        return {
            "accuracy": accuracy(alpha_NA, labels_N),
            "ece_before": ece(raw_NA, labels_N),
            "ece_after": ece(alpha_NA, labels_N),
            "brier": float(brier_B(alpha_NA, labels_N).mean()),
            "n": len(prompts),
            "routed": {
                axis.name: dict(zip([other.name for other in axes], map(int, row), strict=True))
                for axis, row in zip(axes, confused_AA.tolist(), strict=True)
            },
        }

    kept = JsonFile(experiment.folder / "router.json")
    return experiment.step("router", make, kept, reads=["axes", "features"], after=[routed])


def _outputs(chat: Chat, axes: Sequence[Axis], views: Views, made_with: dict[str, str]) -> Outputs:
    """Last hidden states under each adapter where the tokens of a row's answer are predicted. Collective."""
    rows: list[tuple[int, AxisRow]] = []
    start = 0
    for axis in axes:
        rows += list(enumerate(axis.trained("plain"), start))[:REPLY_ROWS]
        start += len(axis.rows.train)
    found = {index: _states(chat, row, number, views) for index, (number, row) in dealt(rows, together=False)}
    parts = from_all_ranks(found)
    hidden_TAH, targets_T, row_T = (torch.cat(side) for side in zip(*parts, strict=True))
    return Outputs(hidden_TAH, targets_T, row_T, made_with)


@torch.no_grad()
def _states(chat: Chat, row: AxisRow, number: int, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    turn = chat.encode(row.prompt, Reply.written(row.answer))
    ids_1S, mask_1S = left_pad([turn.ids], chat.padding, views.adapters.model.device)
    decoder = cast(Any, views.adapters.model).get_decoder()
    states = []
    for axis in views.axes:
        with views.adapters.acting(axis):
            out = decoder(input_ids=ids_1S, attention_mask=mask_1S, use_cache=False)
        states.append(out.last_hidden_state[0, turn.prompt - 1 : -1].cpu())
    targets_T = torch.tensor(turn.ids[turn.prompt :])
    return torch.stack(states, 1), targets_T, torch.full_like(targets_T, number)
