"""The records every other room works with. Only an `id` may appear in logs and reports, never a text."""

from dataclasses import dataclass, field
from typing import Literal

from .errors import UserError

Kind = Literal["harmful", "borderline", "benign", "capability"]
Role = Literal["seen", "unseen", "robust"]
Metric = Literal["exact_match", "token_accuracy"]


@dataclass(frozen=True)
class Prompt:
    """One user turn; `id` is `<source>:<row>` with the 0-based row of the file after filtering."""

    id: str
    text: str
    kind: Kind
    answer: str | None = None


@dataclass(frozen=True)
class Wrapper:
    """A jailbreak template. Raises `UserError` when `text` lacks `placeholder`."""

    id: str
    family: str
    role: Role
    text: str
    placeholder: str

    def __post_init__(self) -> None:
        if not self.placeholder or self.placeholder not in self.text:
            raise UserError(f"jailbreak template {self.id} has no placeholder {self.placeholder!r}")

    def wrap(self, goal: str) -> str:
        """The template with `goal` at every placeholder."""
        return self.text.replace(self.placeholder, goal)


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one source, in row texts as well as in rows."""

    train: list[Prompt]
    test: list[Prompt]


@dataclass(frozen=True)
class Task:
    """A capability task: prompts with answers, scored by `metric`."""

    name: str
    metric: Metric
    prompts: list[Prompt]


@dataclass(frozen=True)
class Corpus:
    """Everything a run reads. `notes` tell what loading dropped, one line each, with counts and no texts."""

    harmful: Split
    benign: Split
    borderline: Split
    wrappers: list[Wrapper]
    tasks: list[Task]
    notes: list[str] = field(default_factory=list)

    def wrappers_of(self, role: Role) -> list[Wrapper]:
        """The wrappers of one role, in the order of the recipe."""
        return [wrapper for wrapper in self.wrappers if wrapper.role == role]
