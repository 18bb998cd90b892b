"""The model under repair together with everything a run asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.schema import Corpus
from trainer.engines.engine import Engine, engine
from trainer.evaluation.generation import reply
from trainer.evaluation.judges.phrases import RefusalJudge
from trainer.evaluation.suite import Suite
from trainer.moe.backbone import Backbone
from trainer.moe.quantised import quantise
from trainer.recipe.schema import Recipe, check_shared_experts
from trainer.runtime.console import say
from trainer.runtime.files import sha256, sha256_text

HASHED_WHOLE = 256 * 2**20
"""Files up to this size (bytes) are hashed; of larger ones, weights mostly, name, size and time must do."""


@dataclass
class Subject:
    """Model, data, judge and questions of one run."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    backbone: Backbone
    corpus: Corpus
    judge: RefusalJudge
    suite: Suite
    fingerprint: str

    @classmethod
    def of(cls, recipe: Recipe) -> Subject:
        """Load everything a recipe names, check the model's contract and split the model as the engine does.

        Raises:
            ValueError: a model without MoE layers, data that does not load; the message names the key or file.
        """
        set_seed(recipe.run.seed)
        corpus = load_corpus(recipe.data, recipe.run.seed)
        for note in corpus.notes:
            say(note)
        if recipe.model.quantization is not None and engine().shards:
            raise UserError(
                f"model.quantization: packed weights cannot be split over processes, found engine {engine().name}; "
                "allowed: single, ddp, zero1, zero2"
            )
        _refuse_optimisers(recipe)
        backbone, tokenizer = engine().load(recipe.model)
        check_shared_experts(recipe, backbone.model.config.model_type, backbone.shared_layers)
        judge = RefusalJudge(recipe.evaluate.refusal_markers)
        suite = Suite(
            corpus,
            judge,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.evaluate.batch_size,
            wraps_per_benign=recipe.evaluate.wraps_per_benign,
        )
        subject = cls(recipe, tokenizer, backbone, corpus, judge, suite, _fingerprint(recipe))
        subject.hold(backbone)
        return subject

    def hold(self, backbone: Backbone) -> None:
        """Put a whole model where it runs: quantised as the recipe says, split over processes as the engine does."""
        if self.recipe.model.quantization is not None:
            quantise(backbone, self.recipe.model.quantization, PartialState().device)
        self.engine.shard(backbone)

    @property
    def holds_parts(self) -> bool:
        """Whether the model in memory is no longer whole, so that experts are split out of a fresh copy."""
        return self.engine.shards or self.recipe.model.quantization is not None

    def reloaded(self) -> Subject:
        """The same with a fresh copy of the model, to be split into trainable and frozen experts. Collective."""
        backbone, tokenizer = engine().load(self.recipe.model)
        return replace(self, backbone=backbone, tokenizer=tokenizer)

    @property
    def engine(self) -> Engine:
        """How this process holds the model."""
        return engine()

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    def hash(self, *sections: str) -> str:
        """Hash of these sections of the recipe and of the model's and data's files: what a stage's result rests on."""
        return sha256_text(self.recipe.hash("model", "data", "run.seed", *sections) + self.fingerprint)

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


def _refuse_optimisers(recipe: Recipe) -> None:
    """bitsandbytes' optimisers (0.50) step plain tensors; FSDP2 holds parameters as DTensors."""
    for name, section in (("repair", recipe.repair), ("consistency", recipe.consistency)):
        optim = str(section.trainer_args.get("optim", ""))
        if engine().name == "fsdp2" and any(part in optim for part in ("8bit", "bnb", "paged")):
            raise UserError(
                f"{name}.optim: found {optim!r}, which cannot step parameters that fsdp2 splits; allowed: "
                "adamw_torch, or another engine (single, ddp, zero1, zero2, zero3)"
            )


def _fingerprint(recipe: Recipe) -> str:
    """Digest of the local files that the recipe names, so that a changed file is noticed when a run is resumed."""
    data = recipe.data
    sources = [data.harmful, data.benign, data.borderline]
    names = [recipe.model.name_or_path, data.jailbreaks.path, *(task.path for task in data.capability)]
    names += [path for source in sources for path in (source.path, source.test_path) if path]
    parts = []
    for name in dict.fromkeys(names):
        path = Path(name)
        for file in sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []:
            if file.is_file():
                stat = file.stat()
                small = stat.st_size <= HASHED_WHOLE
                parts.append(f"{file.name} {sha256(file) if small else (stat.st_size, stat.st_mtime_ns)}")
    return sha256_text("\n".join(parts))
