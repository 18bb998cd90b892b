"""A finished run as a model to ask: its base, its adapters and its head, with transformers' `generate`.

mixture, chat = load_mixture(Path("runs/organism-alignx"))
mixture.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.generation import reply
from trainer.methods.alignx.adapters import Adapter, AxisAdapters
from trainer.methods.alignx.deliver import FOLDER, read_adapter
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.mixture import Mixture, Mode
from trainer.methods.alignx.recipe import AlignxRecipe
from trainer.methods.alignx.route import about
from trainer.methods.table import load_recipe
from trainer.model.chat import Chat
from trainer.model.load import load
from trainer.moe.backbone import Backbone

MODES = ("weights", "top1", "hidden")


@dataclass(frozen=True)
class Answered:
    """`alpha`: axis -> its weight on the prompt, as the mode used it."""

    alpha: dict[str, float]
    text: str


def load_mixture(folder: Path, mode: Mode | None = None) -> tuple[Mixture, Chat]:
    """The mixture of a finished run and the chat of its model. `mode` None: the recipe's.

    Raises:
        UserError: no run of this method, an adapter or head that is missing, or a head of another base or adapters.
        ValueError: an adapter of other targets or another rank than the recipe says.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    if not isinstance(recipe, AlignxRecipe):
        raise UserError(f"{folder}: a run of method {recipe.method}; expected one of method alignx")
    states = {name: read_adapter(folder / FOLDER / name) for name in recipe.names}
    model, tokenizer = load(recipe.model)
    chat = Chat.of(model, tokenizer, recipe.model)
    adapters = AxisAdapters(Backbone.of(model, takes_dense=True), recipe.names, recipe.adapters, recipe.run.seed)
    for name, state in states.items():
        Adapter(adapters, name).load_state_dict(state)
    made_with = about(adapters, recipe.names, recipe.features)
    head = MoCaE.load(folder / "head.safetensors", made_with).to(model.device)
    views = Views(adapters, recipe.names, recipe.features)
    return Mixture(views, head, mode or recipe.inference.mode), chat


def answer(
    folder: Path, prompts: Sequence[str], mode: str | None, max_new_tokens: int, batch_size: int
) -> list[Answered]:
    """Greedy replies of a run's mixture, in the order of the prompts; raises as `load_mixture`.

    Raises:
        UserError: an empty prompt, or one that leaves no room for the reply; a mode that there is not.
    """
    if mode is not None and mode not in MODES:
        raise UserError(f"--mode: found {mode!r}; allowed: {', '.join(MODES)}")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("prompts: found an empty text; allowed: what the model is to be asked")
    mixture, chat = load_mixture(folder, cast(Mode | None, mode))
    asked = [Conversation.of(prompt) for prompt in prompts]
    said = reply(
        cast(PreTrainedModel, mixture),
        chat,
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        label="replies",
        key="--max-new-tokens",
    )
    features_NVD = mixture.views.of_prompts(chat, asked, "weights of the axes")
    alpha_NA = mixture.used(features_NVD.to(mixture.device))
    return [
        Answered(dict(zip(mixture.views.axes, row, strict=True)), one.text)
        for row, one in zip(alpha_NA.tolist(), said, strict=True)
    ]
