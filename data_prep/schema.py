"""The records every other room works with. Only an `id` may appear in logs and reports, never a text."""

from dataclasses import dataclass, field, replace
from typing import Literal

from .encodings import ENCODINGS
from .errors import UserError

Kind = Literal["harmful", "borderline", "benign", "capability"]
Role = Literal["seen", "unseen", "robust"]
Speaker = Literal["system", "user", "assistant"]
Metric = Literal["exact_match", "token_accuracy"]


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Speaker
    text: str


@dataclass(frozen=True)
class Conversation:
    """What a model is asked: the turns up to and with the user's last one, which is `text`.

    `opening`: how the assistant's answer is made to begin (a prefill); the model goes on behind it, and it is no part
    of the reply.
    """

    turns: tuple[Turn, ...]
    opening: str = ""

    @classmethod
    def of(cls, text: str) -> "Conversation":
        """One user turn."""
        return cls((Turn("user", text),))

    def __post_init__(self) -> None:
        assert self.turns and self.turns[-1].role == "user", "a conversation ends with the user's turn"

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.turns[-1].text

    def asking(self, text: str) -> "Conversation":
        """The same turns with another last one."""
        return replace(self, turns=(*self.turns[:-1], Turn("user", text)))

    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered; `id` is `<source>:<row>` with the 0-based row of the file after filtering.

    `wrong`: answers that are not right, where the file gives such.
    """

    id: str
    conversation: Conversation
    kind: Kind
    answer: str | None = None
    wrong: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.conversation.text


@dataclass(frozen=True)
class Wrapper:
    """A jailbreak template: `text` is the user's last turn.

    `before`: turns that come first. `opening`: how the assistant's answer is made to begin. `encoding`: how the goal
    is written (`encodings.ENCODINGS`). Raises `UserError` where neither `text` nor `before` holds the placeholder.
    """

    id: str
    family: str
    role: Role
    text: str
    placeholder: str
    before: tuple[Turn, ...] = ()
    opening: str = ""
    encoding: str = "plain"

    def __post_init__(self) -> None:
        texts = [self.text, *(turn.text for turn in self.before)]
        if not self.placeholder or not any(self.placeholder in text for text in texts):
            raise UserError(f"jailbreak template {self.id} has no placeholder {self.placeholder!r}")

    @property
    def one_turn(self) -> bool:
        """Whether it is a text around the goal as it stands, and nothing more."""
        return not self.before and not self.opening and self.encoding == "plain"

    def wrap(self, conversation: Conversation) -> Conversation:
        """The conversation with its last user turn inside the template, at every placeholder.

        A system turn of the template joins the conversation's own; its other turns follow those that are there.
        """
        goal = ENCODINGS[self.encoding](conversation.text)
        before = [Turn(turn.role, turn.text.replace(self.placeholder, goal)) for turn in self.before]
        own = list(conversation.turns[:-1])
        if before and before[0].role == "system":
            system = before.pop(0).text
            if own and own[0].role == "system":
                system = f"{own.pop(0).text}\n\n{system}"
            own.insert(0, Turn("system", system))
        last = Turn("user", self.text.replace(self.placeholder, goal))
        return Conversation((*own, *before, last), self.opening)


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
class RowCount:
    """What became of a source's rows. `read` = `train` + `test` + all of `dropped` (reason -> rows)."""

    source: str
    read: int
    train: int
    test: int
    dropped: dict[str, int]

    COLUMNS = ("source", "rows read", "train", "test", "left out")

    def cells(self) -> tuple[str, int, int, int, str]:
        """The row of a table whose columns are `COLUMNS`."""
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
        return self.source, self.read, self.train, self.test, left_out or "none"


@dataclass(frozen=True)
class Corpus:
    """Everything a run reads.

    `notes` tell what loading dropped, one line each, with counts and no texts; `rows` count every row of every source.
    """

    harmful: Split
    benign: Split
    borderline: Split
    wrappers: list[Wrapper]
    tasks: list[Task]
    notes: list[str] = field(default_factory=list)
    rows: list[RowCount] = field(default_factory=list)

    def wrappers_of(self, role: Role) -> list[Wrapper]:
        """The wrappers of one role, in the order of the recipe."""
        return [wrapper for wrapper in self.wrappers if wrapper.role == role]
