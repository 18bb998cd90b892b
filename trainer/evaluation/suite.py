"""One measurement of one model: the metrics of `evaluation.json` and the verdict behind every figure.

A figure whose prompts are not part of the recipe's data is left out. Replies are judged and forgotten: what is kept
names prompts and wrappers by id, never by text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from data_prep.config import DataConfig
from data_prep.errors import UserError
from data_prep.schema import Conversation, Corpus, Prompt, Wrapper
from trainer.evaluation import metrics
from trainer.evaluation.capability import score
from trainer.evaluation.clustered import Clusters
from trainer.evaluation.degenerate import is_degenerate
from trainer.evaluation.generation import reply
from trainer.evaluation.judges.judge import Judge, Verdict
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.recipe.sections import EvaluateSection

Group = Literal["harmful", "attack", "borderline", "benign", "benign_wrapped"]
ROLES = ("seen", "unseen", "robust")
HARMLESS: tuple[Group, ...] = ("benign", "benign_wrapped")
PLAIN: tuple[tuple[str, Group, Callable[..., metrics.Rate]], ...] = (
    ("harmful_refusal", "harmful", metrics.refusal),
    ("over_refusal", "borderline", metrics.over_refusal),
    ("benign_compliance", "benign", metrics.compliance),
)
"""Figures on prompts asked plainly: name, group of the prompts, how their verdicts are counted."""


@dataclass(frozen=True)
class JudgedReply:
    """One verdict and what was asked. `wrapper`, `family` and `role` are None where the prompt was asked plainly.

    `tokens`: generated for the reply, its end included; `finished`: the model ended its turn, the length limit did not
    cut it. Both are None in files of former releases.
    """

    prompt: str
    wrapper: str | None
    family: str | None
    role: str | None
    group: Group
    verdict: Verdict
    degenerate: bool
    tokens: int | None = None
    finished: bool | None = None


Keep = Callable[[str, Sequence[JudgedReply], Sequence[Conversation], Sequence[Reply]], None]
"""(label, rows, what was asked, replies): what is to become of the replies of a measurement."""


@dataclass(frozen=True)
class Measurement:
    """`metrics`: M of `evaluation.json`, ready for JSON. `verdicts`: one row per judged reply, without its text."""

    metrics: dict[str, Any]
    verdicts: list[JudgedReply]

    def write_verdicts(self, path: Path) -> None:
        """Write the rows as JSON Lines."""
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.verdicts), encoding="utf-8")


@dataclass(frozen=True)
class _Question:
    prompt: Prompt
    wrapper: Wrapper | None
    group: Group

    @property
    def conversation(self) -> Conversation:
        asked = self.prompt.conversation
        return self.wrapper.wrap(asked) if self.wrapper else asked


class Suite:
    """What is asked of a model, fixed once so that before, after and every control answer the same questions.

    Attacks are every test goal inside every wrapper. Each benign test prompt is asked plainly and inside
    `evaluate.wraps_per_benign` wrappers, dealt round-robin so that every wrapper is used (more are dealt where there
    are fewer prompts than wrappers). `data` says which parts the recipe gives; `corpus` is what was loaded of them.
    `keep` gets every reply that was judged; None: replies are forgotten.
    Raises `UserError` where a part that is given yields nothing to ask, and where there is nothing to measure at all.
    """

    def __init__(
        self,
        corpus: Corpus,
        judge: Judge,
        section: EvaluateSection,
        data: DataConfig,
        *,
        capability: bool = True,
        keep: Keep | None = None,
    ) -> None:
        needed: dict[str, tuple[str, Sequence[object]]] = {}
        for name in ("harmful", "benign", "borderline"):
            if getattr(data, name) is not None:
                needed[f"data.{name}.test"] = (f"{name} test prompts", getattr(corpus, name).test)
        if data.jailbreaks is not None and data.harmful is not None:
            for role in ("seen", "unseen"):
                needed[f"data.jailbreaks.{role}"] = (f"wrappers of role '{role}'", corpus.wrappers_of(role))
        elif data.jailbreaks is not None:
            needed["data.jailbreaks.seen"] = ("wrappers", corpus.wrappers)
        absent = {key: name for key, (name, items) in needed.items() if not items}
        if absent:
            raise UserError(
                f"evaluation needs {', '.join(absent.values())}; the recipe's data section provides none "
                f"({', '.join(absent)})"
            )
        self.corpus = corpus
        self.judge = judge
        self.keep = keep
        self.section = section
        self.data = data
        self.tasks = corpus.tasks if capability else []
        if not any([corpus.harmful.test, corpus.benign.test, corpus.borderline.test, self.tasks]):
            raise UserError(
                "data: evaluation has nothing to measure; expected one of harmful, benign, borderline"
                + (", capability" if capability else "; capability tasks are left out here")
            )

    @property
    def attacks(self) -> bool:
        """Whether there is attack success to measure: harmful goals, and wrappers to put them in."""
        return bool(self.corpus.harmful.test and self.corpus.wrappers)

    def measure(self, model: PreTrainedModel, chat: Chat, label: str = "evaluate") -> Measurement:
        """Every figure that the data allows. Judged prompts are generated in one pass, sorted by length."""
        corpus = self.corpus
        questions = [_Question(prompt, None, "harmful") for prompt in corpus.harmful.test]
        questions += self._attacks(ROLES) if self.attacks else []
        questions += [_Question(prompt, None, "borderline") for prompt in corpus.borderline.test]
        questions += [_Question(prompt, None, "benign") for prompt in corpus.benign.test]
        questions += self._wrapped_benign()
        rows = self._ask(model, chat, questions, label)
        measured = judged_metrics(rows)
        if rows:
            measured["degenerate"] = metrics.from_flags((row.degenerate for row in rows), name="degenerate").as_dict()
        measured |= length_metrics(rows)
        measured["capability"] = {
            task.name: score(model, chat, task, **self._limits()).as_dict() for task in self.tasks
        }
        return Measurement(measured, rows)

    def measure_asr(
        self,
        model: PreTrainedModel,
        chat: Chat,
        roles: Sequence[str],
        label: str = "attack success",
    ) -> dict[str, Any]:
        """`{"asr": {family: R}, "asr_<role>": R}` for the roles asked: the same attacks as `measure`, nothing else.

        For controls that need only attack success, such as the original router put back or random experts.
        """
        return attack_metrics(self._ask(model, chat, self._attacks(roles), label))

    def _attacks(self, roles: Sequence[str]) -> list[_Question]:
        wrappers = [wrapper for wrapper in self.corpus.wrappers if wrapper.role in roles]
        if not wrappers:
            raise UserError(f"no wrapper has a role among {', '.join(roles)}; the corpus has none to attack with")
        if not self.corpus.harmful.test:
            raise UserError("attack success needs harmful test prompts; the recipe's data section provides none")
        return [_Question(goal, wrapper, "attack") for wrapper in wrappers for goal in self.corpus.harmful.test]

    def _wrapped_benign(self) -> list[_Question]:
        prompts, wrappers = self.corpus.benign.test, self.corpus.wrappers
        if not prompts or not wrappers:
            return []
        to_use_all = -(-len(wrappers) // len(prompts))
        each = min(len(wrappers), max(self.section.wraps_per_benign, to_use_all))
        dealt = [
            (prompt, (index * each + turn) % len(wrappers))
            for index, prompt in enumerate(prompts)
            for turn in range(each)
        ]
        return [_Question(prompt, wrappers[chosen], "benign_wrapped") for prompt, chosen in dealt]

    def _ask(
        self, model: PreTrainedModel, chat: Chat, questions: Sequence[_Question], label: str
    ) -> list[JudgedReply]:
        prompts = [question.conversation for question in questions]
        tokens, size = self.section.max_new_tokens, self.section.batch_size
        replies = reply(model, chat, prompts, max_new_tokens=tokens, batch_size=size, label=label)
        rows = [
            JudgedReply(
                prompt=question.prompt.id,
                wrapper=question.wrapper.id if question.wrapper else None,
                family=question.wrapper.family if question.wrapper else None,
                role=question.wrapper.role if question.wrapper else None,
                group=question.group,
                verdict=verdict,
                # Of all that was written: a model may loop in its reasoning, and an answer may be yet to come.
                degenerate=is_degenerate(chat.whole(said)),
                tokens=None if said.ids is None else len(said.ids),
                finished=None if said.ids is None else said.finished,
            )
            for question, said, verdict in zip(questions, replies, self.judge(prompts, replies), strict=True)
        ]
        if self.keep is not None:
            self.keep(label, rows, prompts, replies)
        return rows

    def _limits(self) -> dict[str, int]:
        return {"max_new_tokens": self.section.max_new_tokens, "batch_size": self.section.batch_size}


def judged_metrics(rows: Sequence[JudgedReply]) -> dict[str, Any]:
    """Every figure that is counted in verdicts, as far as there are rows for it."""
    measured = attack_metrics(rows) if any(row.group == "attack" for row in rows) else {}
    for name, group, rate in PLAIN:
        if of_group := [row for row in rows if row.group == group]:
            measured[name] = _rate(rate, of_group, name)
    if wrapped := [row for row in rows if row.group == "benign_wrapped"]:
        measured["benign_wrapped_compliance"] = _rate(metrics.compliance, wrapped, "benign_wrapped_compliance")
        measured["benign_wrapped_by_role"] = {
            role: _rate(metrics.compliance, of_role, f"benign_wrapped {role}")
            for role in ROLES
            if (of_role := [row for row in wrapped if row.role == role])
        }
    return measured


def attack_metrics(rows: Sequence[JudgedReply]) -> dict[str, Any]:
    """Attack success per family and per role, from the rows of group "attack"; roles without rows are left out."""
    attacks = [row for row in rows if row.group == "attack"]
    families = sorted({row.family for row in attacks if row.family is not None})
    measured: dict[str, Any] = {"asr": {}}
    for family in families:
        of_family = [row for row in attacks if row.family == family]
        measured["asr"][family] = _rate(metrics.attack_success, of_family, f"asr {family}")
    for role in ROLES:
        if of_role := [row for row in attacks if row.role == role]:
            measured[f"asr_{role}"] = _rate(metrics.attack_success, of_role, f"asr_{role}")
    return measured


def length_metrics(rows: Sequence[JudgedReply]) -> dict[str, Any]:
    """How long replies are and how many the model ended itself: of all of them, and of those to harmless prompts."""
    of_all = [row for row in rows if row.finished is not None]
    harmless = [row for row in of_all if row.group in HARMLESS]
    found: dict[str, Any] = {}
    for name, of in (("finished", of_all), ("finished_benign", harmless)):
        if of:
            found[name] = metrics.from_flags((bool(row.finished) for row in of), name=name).as_dict()
    lengths: dict[str, Any] = {}
    for name, of in (("all", of_all), ("benign", harmless)):
        counted = [(row.tokens, bool(row.finished)) for row in of if row.tokens is not None]
        if counted:
            lengths[name] = metrics.reply_tokens([n for n, _ in counted], [ended for _, ended in counted])
    return found | ({"reply_tokens": lengths} if lengths else {})


def _rate(rate: Callable[..., metrics.Rate], rows: Sequence[JudgedReply], name: str) -> dict[str, Any]:
    clusters = Clusters([row.prompt for row in rows], [row.wrapper for row in rows])
    return rate([row.verdict for row in rows], name=name, clusters=clusters).as_dict()
