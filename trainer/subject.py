"""The model under repair together with everything a run asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from data_prep.corpus import load_corpus
from data_prep.schema import Corpus
from trainer.console import say
from trainer.evaluation.generation import reply
from trainer.evaluation.judge import RefusalJudge
from trainer.evaluation.suite import Suite
from trainer.loading import load
from trainer.moe.backbone import Backbone
from trainer.recipe import Recipe


@dataclass
class Subject:
    """Model, data, judge and questions of one run."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    backbone: Backbone
    corpus: Corpus
    judge: RefusalJudge
    suite: Suite

    @classmethod
    def of(cls, recipe: Recipe) -> Subject:
        """Load everything a recipe names and check the model's contract.

        Raises:
            ValueError: a model without MoE layers, data that does not load; the message names the key or file.
        """
        set_seed(recipe.run.seed)
        corpus = load_corpus(recipe.data, recipe.run.seed)
        for note in corpus.notes:
            say(note)
        model, tokenizer = load(recipe.model)
        judge = RefusalJudge(recipe.evaluate.refusal_markers)
        suite = Suite(
            corpus,
            judge,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.evaluate.batch_size,
            wraps_per_benign=recipe.evaluate.wraps_per_benign,
        )
        return cls(recipe, tokenizer, Backbone.of(model).check(), corpus, judge, suite)

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    def replies_of(self, model: PreTrainedModel) -> Callable[[Sequence[str], str], list[str]]:
        """(prompts, label) -> replies of `model`, as detection and the training rows ask for them."""
        detect = self.recipe.detect
        return lambda prompts, label: reply(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=detect.max_new_tokens,
            batch_size=self.recipe.evaluate.batch_size,
            label=label,
        )
