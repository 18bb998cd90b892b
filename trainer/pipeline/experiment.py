"""One run of a recipe: its folder, the model, the data, the judge, and everything that is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.schema import Conversation, Corpus, RowCount
from trainer.engines.engine import Engine, engine
from trainer.engines.table import names
from trainer.evaluation.generation import positions, reply
from trainer.evaluation.judges.judge import Judge, judge_of
from trainer.evaluation.suite import Keep, Suite
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.quantised import quantise
from trainer.pipeline.replies import keep_in
from trainer.recipe.schema import Recipe
from trainer.recipe.sections import EvaluateSection, RepliesSection
from trainer.run.folder import Run
from trainer.run.manifest import Manifest
from trainer.run.step import Artefact, JsonFile, Kept, Step
from trainer.runtime.console import say, table
from trainer.runtime.files import fingerprint, sha256_text

__all__ = [
    "Experiment",
    "JsonFile",
    "Kept",
    "Opened",
    "Step",
    "method_of_run",
    "opened",
    "reopened",
]

R = TypeVar("R", bound=Recipe)
M = TypeVar("M")
T = TypeVar("T")


@dataclass(frozen=True)
class Opened(Generic[R]):
    """A recipe whose run folder is open; nothing is loaded yet. `keep_replies`: there, as `replies.py` does."""

    recipe: R
    run: Run
    keep_replies: bool = False

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.dir

    def load(self) -> Experiment[R]:
        """Load everything that the recipe names; raises as `Experiment.of`."""
        return Experiment.of(self.recipe, self.run, keep_in(self.folder) if self.keep_replies else None)


@contextmanager
def opened(recipe: R, *, force: bool = False, keep_replies: bool = False) -> Iterator[Opened[R]]:
    """The run folder of a recipe, made or taken up; `force` empties it first. Raises as `Run.open`."""
    with Run.open(recipe, force=force) as run:
        yield Opened(recipe, run, keep_replies)


@contextmanager
def reopened(folder: Path, recipe_of: Callable[..., Recipe]) -> Iterator[Opened[Recipe]]:
    """An existing run folder with the recipe that it keeps. Raises as `Run.reopen`."""
    with Run.reopen(folder, recipe_of) as run:
        yield Opened(run.recipe, run)


def method_of_run(folder: Path) -> str:
    """Name of the method that a run folder was made by. `UserError` where it is none."""
    return str(Manifest.read(folder).recipe.get("method"))


@dataclass
class Experiment(Generic[R]):
    """Model, data, judge and questions of one run. `run` is None where nothing is kept (a measurement alone)."""

    recipe: R
    run: Run | None
    chat: Chat
    backbone: Backbone
    corpus: Corpus
    judge: Judge
    suite: Suite
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, recipe: R, run: Run | None = None, keep: Keep | None = None) -> Experiment[R]:
        """Load everything a recipe names, check the model's contract and split the model as the engine does.

        `keep` gets the replies of every measurement.

        Raises:
            ValueError: a model without MoE layers, data that does not load; the message names the key or file.
        """
        set_seed(recipe.run.seed)
        corpus = load_corpus(recipe.data, recipe.run.seed)
        table("data", RowCount.COLUMNS, (count.cells() for count in corpus.rows))
        for note in corpus.notes:
            say(note)
        if recipe.model.quantization is not None and not engine().capabilities.holds_packed_weights:
            raise UserError(
                f"model.quantization: packed weights cannot be split over processes, found engine {engine().name}; "
                f"allowed: {', '.join(names(lambda e: e.holds_packed_weights))}"
            )
        backbone, tokenizer = engine().load(recipe.model, takes_dense=recipe.takes_dense)
        _check_lengths(recipe, backbone.model)
        chat = Chat.of(backbone.model, tokenizer, recipe.model)
        judge = judge_of(recipe.evaluate)
        suite = Suite(corpus, judge, recipe.evaluate, recipe.data, keep=keep)
        experiment = cls(recipe, run, chat, backbone, corpus, judge, suite)
        experiment.hold(backbone)
        return experiment

    # --- the model --------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    @property
    def engine(self) -> Engine:
        """How this process holds the model."""
        return engine()

    def hold(self, backbone: Backbone) -> None:
        """Put a whole model where it runs: quantised as the recipe says, split over processes as the engine does."""
        if self.recipe.model.quantization is not None:
            quantise(backbone, self.recipe.model.quantization, PartialState().device)
        self.engine.shard(backbone)

    @property
    def holds_parts(self) -> bool:
        """Whether the model in memory is no longer whole, so that experts are split out of a fresh copy."""
        return self.engine.capabilities.splits_parameters or self.recipe.model.quantization is not None

    def reloaded(self) -> Experiment[R]:
        """The same with a fresh copy of the model, to be split into trainable and frozen experts. Collective."""
        backbone, tokenizer = engine().load(self.recipe.model, takes_dense=self.recipe.takes_dense)
        return replace(self, backbone=backbone, chat=Chat.of(backbone.model, tokenizer, self.recipe.model))

    def ask(
        self,
        prompts: Sequence[Conversation],
        label: str,
        *,
        section: RepliesSection | EvaluateSection,
    ) -> list[Reply]:
        """Replies of the model, of as many tokens as a section of the recipe says."""
        whose = next(
            (name for name in type(self.recipe).model_fields if getattr(self.recipe, name) is section), "detect"
        )
        return reply(
            self.model,
            self.chat,
            prompts,
            max_new_tokens=section.max_new_tokens,
            batch_size=self.recipe.evaluate.batch_size,
            label=label,
            key=f"{whose}.max_new_tokens",
        )

    # --- the run folder ---------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._run.dir

    @property
    def _run(self) -> Run:
        assert self.run is not None, "nothing is kept without a run folder"
        return self.run

    @property
    def versions(self) -> dict[str, str]:
        """Of this release and its libraries."""
        return self._run.versions

    def step(
        self,
        name: str,
        make: Callable[[], M],
        kept: Artefact[M, T],
        *,
        reads: Sequence[str] = (),
        after: Sequence[Step[Any]] = (),
    ) -> Step[T]:
        """`Run.step`; `reads` names the recipe's sections and keys that the step depends on.

        Model, data and seed, and the files that these and the sections name, are always among its inputs.
        """
        return self._run.step(name, make, kept, inputs=self._inputs(reads), after=after)

    def identity(self, name: str, reads: Sequence[str], after: Sequence[Step[Any]]) -> str:
        """What a checkpoint in the middle of a step must agree with."""
        return self._run.identity(name, self._inputs(reads), after)

    def settle(self) -> None:
        """Say that the method went through all its steps, once it did: `Run.settle`."""
        self._run.settle()

    def stage_dir(self, number: int, name: str) -> Path:
        """The folder `stages/<number>-<name>/`."""
        return self._run.stage_dir(number, name)

    def _inputs(self, reads: Sequence[str]) -> str:
        sections = ("model", "data", "run.seed", *reads)
        files = []
        for name in self.recipe.files(*sections):
            if name not in self._fingerprints:
                self._fingerprints[name] = fingerprint(name)
            files.append(self._fingerprints[name])
        return sha256_text("\n".join([self.recipe.hash(*sections), *files]))


def _check_lengths(recipe: Recipe, model: PreTrainedModel) -> None:
    """`UserError` where a reply may be as long as everything that the model has positions for."""
    limit = positions(model)
    for name in type(recipe).model_fields:
        wanted = getattr(getattr(recipe, name), "max_new_tokens", None)
        if limit is not None and wanted is not None and wanted >= limit:
            raise UserError(
                f"{name}.max_new_tokens: found {wanted}; the model has {limit} positions, for prompt and reply"
            )
