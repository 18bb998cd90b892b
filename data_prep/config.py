"""The recipe's `data` section."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .schema import Metric

_BOUND = r"\s*(-?[0-9]{1,12})?\s*"
SLICE = re.compile(rf"^{_BOUND}:{_BOUND}(?::{_BOUND})?$")
SourceFormat = Literal[
    "records",
    "qa",
    "advbench",
    "harmbench",
    "jailbreakbench",
    "strongreject",
    "harmfulqa",
    "beavertails",
    "hh-rlhf",
    "xstest",
    "or-bench",
    "alpaca",
    "safety-tuned-llamas",
    "mt-bench",
    "gsm8k",
    "mmlu",
    "truthfulqa",
    "truthfulqa-mc",
]


def parse_slice(text: str) -> slice:
    """A Python slice from its text, such as `0:320` or `1::2`; raises `ValueError` otherwise."""
    found = SLICE.match(text)
    if found is None:
        raise ValueError(f"expected a count or a slice such as '0:320' or '1::2', not {text!r}")
    start, stop, step = (int(part) if part else None for part in found.groups())
    if step == 0:
        raise ValueError(f"slice step cannot be zero: {text!r}")
    return slice(start, stop, step)


def _checked(rows: int | str) -> int | str:
    if isinstance(rows, str):
        parse_slice(rows)
    elif rows < 0:
        raise ValueError(f"a count cannot be negative: {rows}")
    return rows


def _no_bool(rows: object) -> object:
    if isinstance(rows, bool):
        raise ValueError("expected a count or a slice such as '0:320' or '1::2', not true or false")
    return rows


Rows = Annotated[int | str, BeforeValidator(_no_bool), AfterValidator(_checked)]


class NamesFile:
    """Marks a key whose value names a file, a folder or a data set: what was read from it is an input of a run."""


FileName = Annotated[str, NamesFile()]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


HubFolder = Annotated[str | None, Field(description="Folder of the Hub data set, where it has no configurations.")]
AnswerColumn = Annotated[str | None, Field(description="Column with the answer; null: as the format says.")]
TaskFormat = Literal["qa", "records", "gsm8k", "mmlu", "truthfulqa", "truthfulqa-mc", "mt-bench", "alpaca"]


Family = Literal[
    "all",
    "role-play",
    "persuasion",
    "nested-fiction",
    "encoding",
    "prefix-injection",
    "suffix-injection",
    "multi-turn",
    "prefill",
    "long-story",
]


class SourceConfig(_Section):
    """Where prompts come from and how many go where."""

    path: FileName = Field(
        min_length=1,
        description="Local file (csv, json, jsonl, parquet, or packed as .gz), or a Hub id `owner/name`.",
    )
    format: SourceFormat = Field("records", description="How the file is read; see `data_prep.loaders.FORMATS`.")
    column: str | None = Field(
        None, description="Column with the prompt, a text or chat messages; null: as the format says."
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch; only for Hub data sets.")
    hub_config: str | None = Field(None, description="Configuration of the Hub data set, where it has several.")
    hub_split: str = Field("train", description="Split of the Hub data set.")
    hub_folder: HubFolder = None
    answer_column: AnswerColumn = None
    test_path: FileName | None = Field(
        None, min_length=1, description="Second file or data set that the test part is taken from."
    )
    train: Rows = Field(0, description="Rows to train on: a count (seeded shuffle) or a slice, '0:320'.")
    test: Rows = Field(0, description="Rows to evaluate on: a count (seeded shuffle) or a slice, '420:520'.")


class AxisSource(SourceConfig):
    """Prompts of one axis with the answers that are right there. Rows with one text never stand on both sides."""

    wrong: str | None = Field(
        None, min_length=1, description="Column with answers that are not right, a text or a list; `records`."
    )
    only: dict[str, bool | int | str] = Field(
        default_factory=dict, description="Column -> value that a row must have, such as {is_safe: true}; `records`."
    )


class JailbreakConfig(_Section):
    """Which jailbreak templates are trained on, and which only measured.

    Without any selector whole families are dealt to `seen` and `unseen`, drawn with the run's seed.
    """

    path: FileName | None = Field(
        None,
        min_length=1,
        description="File of templates: JSON {group: [template, ...]}, or a table with a text or a messages column.",
    )
    families: list[Family] = Field(
        default_factory=list, description="Families that come with the project; all: every one."
    )
    format: Literal["templates"] = Field("templates", description="How the file is read; only `templates`.")
    placeholder: str = Field("[INSERT PROMPT HERE]", description="What stands for the goal inside a template.")
    seen: list[str] = Field(
        default_factory=list, description="Selectors of templates used in training: 'group', 'group[0]', 'group[0:4]'."
    )
    unseen: list[str] = Field(default_factory=list, description="Selectors of templates only measured.")
    robust: list[str] = Field(default_factory=list, description="Selectors of templates the model already withstands.")

    @model_validator(mode="after")
    def _has_templates(self) -> "JailbreakConfig":
        if self.path is None and not self.families:
            raise ValueError("found neither path nor families; expected a file of templates, or families: [all]")
        return self


class TaskConfig(_Section):
    """A capability task: what the repaired model must still be able to do."""

    name: str = Field(description="Name in the evaluation.")
    path: FileName = Field(min_length=1, description="Local file or Hub data set id.")
    format: TaskFormat = Field("qa", description="How the file is read; `qa`: question and answer columns.")
    column: str | None = Field(None, description="Column with the question.")
    revision: str | None = Field(None, description="Hub commit, tag or branch; only for Hub data sets.")
    hub_config: str | None = Field(None, description="Configuration of the Hub data set, where it has several.")
    hub_split: str = Field("test", description="Split of the Hub data set.")
    hub_folder: HubFolder = None
    answer_column: AnswerColumn = None
    metric: Metric = Field("exact_match", description="exact_match on the reply, or token_accuracy under the answer.")
    test: Rows = Field(100, description="Rows to evaluate on: a count or a slice.")


class DataConfig(_Section):
    """The whole `data` section. A method says which parts it needs; figures on parts that are absent are left out."""

    harmful: SourceConfig | None = Field(None, description="Harmful goals, to be refused.")
    jailbreaks: JailbreakConfig | None = Field(None, description="Templates that wrap a goal.")
    benign: SourceConfig | None = Field(None, description="Harmless prompts, to be answered.")
    borderline: SourceConfig | None = Field(None, description="Harmless prompts that look harmful, to be answered.")
    capability: list[TaskConfig] = Field(default_factory=list, description="Capability tasks.")
    near_duplicates: float | None = Field(
        0.6,
        gt=0,
        le=1,
        description="Training rows whose content words agree with a harmful test goal's to this share (Jaccard) are "
        "dropped, and those that hold one; null: only rows of the same text are.",
    )
