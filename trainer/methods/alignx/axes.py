"""The axes of a run: their rows, plain and with the injected prefix, and the groups that stay on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.axes import AxisRows, load_axes
from data_prep.errors import UserError
from data_prep.same_text import compared
from data_prep.schema import Conversation, RowCount
from trainer.methods.alignx.passes import AxisRow
from trainer.methods.alignx.recipe import AlignxRecipe, AxisSection
from trainer.model.chat import Chat
from trainer.pipeline.experiment import Experiment
from trainer.runtime.console import say, table
from trainer.runtime.files import sha256_text


@dataclass(frozen=True)
class Axis:
    """One axis: its section of the recipe, and its prompts with their answers."""

    section: AxisSection
    rows: AxisRows

    @property
    def name(self) -> str:
        return self.section.name

    def trained(self, pass_: str) -> list[AxisRow]:
        """The training rows of a pass, `plain` or `injected`."""
        return [
            AxisRow(
                prompt.conversation if pass_ == "plain" else injected(prompt.conversation, self.section.injected),
                prompt.answer or "",
                self.name,
            )
            for prompt in self.rows.train
        ]


def injected(conversation: Conversation, prefix: str) -> Conversation:
    """The prefix before the last user turn, a blank line between."""
    return conversation.asking(f"{prefix}\n\n{conversation.text}")


def axes_of(experiment: Experiment[AlignxRecipe]) -> list[Axis]:
    """The rows of every axis, in the recipe's order.

    Raises:
        UserError: as `load_axes`; an axis whose prefix the chat template drops.
    """
    recipe, corpus = experiment.recipe, experiment.corpus
    tested = [*corpus.harmful.test, *corpus.benign.test, *corpus.borderline.test]
    tested += [prompt for task in corpus.tasks for prompt in task.prompts]
    sources = {axis.name: axis.data for axis in recipe.axes}
    loaded = load_axes(
        sources, {axis.name: axis.judge in ("answer", "closer") for axis in recipe.axes}, tested, recipe.run.seed
    )
    table("axes", RowCount.COLUMNS, (count.cells() for count in loaded.rows))
    for note in loaded.notes:
        say(note)
    found = [Axis(section, rows) for section, rows in zip(recipe.axes, loaded.axes, strict=True)]
    if "injected" in recipe.adapters.passes:
        for number, axis in enumerate(found):
            _refuse_dropped(experiment.chat, axis, number)
    return found


def _refuse_dropped(chat: Chat, axis: Axis, number: int) -> None:
    prefix = axis.section.injected
    conversation = axis.rows.train[0].conversation
    shown = str(chat.tokenizer.decode(chat.opening(injected(conversation, prefix))))
    if "".join(prefix.split()) not in "".join(shown.split()):
        raise UserError(
            f"axes.{number}.prefix: the chat template drops the prefix of axis {axis.name!r}; expected one that gets "
            "into the prompt"
        )


def groups_of(axes: Sequence[Axis]) -> list[str]:
    """For every training prompt, axis by axis, a name that prompts of one text share."""
    return [sha256_text(repr(compared(prompt.conversation)))[:16] for axis in axes for prompt in axis.rows.train]
