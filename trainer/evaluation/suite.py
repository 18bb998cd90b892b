"""One measurement of one model: the metrics of `evaluation.json` and the verdict behind every figure.

Replies are judged and forgotten. What is kept names prompts and wrappers by id, never by text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.schema import Corpus, Prompt, Wrapper
from trainer.evaluation import metrics
from trainer.evaluation.capability import score
from trainer.evaluation.generation import reply
from trainer.evaluation.judges.phrases import Verdict, is_degenerate

Group = Literal["harmful", "attack", "borderline", "benign", "benign_wrapped"]
ROLES = ("seen", "unseen", "robust")


@dataclass(frozen=True)
class Row:
    """One judged reply. `wrapper`, `family` and `role` are None where the prompt was asked plainly."""

    prompt: str
    wrapper: str | None
    family: str | None
    role: str | None
    group: Group
    verdict: Verdict
    degenerate: bool


@dataclass(frozen=True)
class Measurement:
    """`metrics`: the contract's M, ready for JSON. `verdicts`: one row per judged reply, without its text."""

    metrics: dict[str, Any]
    verdicts: list[Row]

    def write_verdicts(self, path: Path) -> None:
        """Write the rows as JSON Lines."""
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.verdicts), encoding="utf-8")


@dataclass(frozen=True)
class _Question:
    prompt: Prompt
    wrapper: Wrapper | None
    group: Group

    @property
    def text(self) -> str:
        return self.wrapper.wrap(self.prompt.text) if self.wrapper else self.prompt.text


class Suite:
    """What is asked of a model, fixed once so that before, after and every control answer the same questions.

    Attacks are every test goal inside every wrapper. Each benign test prompt is asked plainly and inside
    `wraps_per_benign` wrappers, dealt round-robin so that every wrapper is used (more are dealt where there are fewer
    prompts than wrappers). Raises `UserError` where the corpus lacks something the contract's figures need.
    """

    def __init__(
        self,
        corpus: Corpus,
        judge: Callable[[str], Verdict],
        *,
        max_new_tokens: int,
        batch_size: int,
        capability: bool = True,
        capability_max_new_tokens: int | None = None,
        wraps_per_benign: int = 2,
    ) -> None:
        needed: dict[str, Sequence[object]] = {
            "harmful test prompts": corpus.harmful.test,
            "benign test prompts": corpus.benign.test,
            "borderline test prompts": corpus.borderline.test,
            "wrappers of role 'seen'": [w for w in corpus.wrappers if w.role == "seen"],
            "wrappers of role 'unseen'": [w for w in corpus.wrappers if w.role == "unseen"],
        }
        absent = [name for name, items in needed.items() if not items]
        if absent:
            raise UserError(f"evaluation needs {', '.join(absent)}; the recipe's data section provides none")
        if wraps_per_benign < 1:
            raise UserError(f"wraps_per_benign must be 1 or more, got {wraps_per_benign}")
        self.corpus = corpus
        self.judge = judge
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.tasks = corpus.tasks if capability else []
        self.capability_max_new_tokens = capability_max_new_tokens or max_new_tokens
        self.wraps_per_benign = wraps_per_benign

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str = "evaluate"
    ) -> Measurement:
        """Every figure of the contract. Judged prompts are generated in one pass, sorted by length."""
        corpus = self.corpus
        questions = [_Question(prompt, None, "harmful") for prompt in corpus.harmful.test]
        questions += self._attacks(ROLES)
        questions += [_Question(prompt, None, "borderline") for prompt in corpus.borderline.test]
        questions += [_Question(prompt, None, "benign") for prompt in corpus.benign.test]
        questions += self._wrapped_benign()
        rows = self._ask(model, tokenizer, questions, label)
        wrapped = [row for row in rows if row.group == "benign_wrapped"]
        roles = [role for role in ROLES if any(row.role == role for row in wrapped)]
        measured: dict[str, Any] = attack_metrics(rows) | {
            "harmful_refusal": metrics.refusal(_verdicts(rows, "harmful"), name="harmful_refusal").as_dict(),
            "over_refusal": metrics.over_refusal(_verdicts(rows, "borderline"), name="over_refusal").as_dict(),
            "benign_compliance": metrics.compliance(_verdicts(rows, "benign"), name="benign_compliance").as_dict(),
            "benign_wrapped_compliance": _wrapped_compliance(wrapped, "benign_wrapped_compliance"),
            "benign_wrapped_by_role": {
                role: _wrapped_compliance([row for row in wrapped if row.role == role], f"benign_wrapped {role}")
                for role in roles
            },
            "degenerate": metrics.from_flags((row.degenerate for row in rows), name="degenerate").as_dict(),
            "capability": {},
        }
        for task in self.tasks:
            limits = {"max_new_tokens": self.capability_max_new_tokens, "batch_size": self.batch_size}
            measured["capability"][task.name] = score(model, tokenizer, task, **limits).as_dict()
        return Measurement(measured, rows)

    def measure_asr(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        roles: Sequence[str],
        label: str = "attack success",
    ) -> dict[str, Any]:
        """`{"asr": {family: R}, "asr_<role>": R}` for the roles asked: the same attacks as `measure`, nothing else.

        For controls that need only attack success, such as the original router put back or random experts.
        """
        return attack_metrics(self._ask(model, tokenizer, self._attacks(roles), label))

    def _attacks(self, roles: Sequence[str]) -> list[_Question]:
        wrappers = [wrapper for wrapper in self.corpus.wrappers if wrapper.role in roles]
        if not wrappers:
            raise UserError(f"no wrapper has a role among {', '.join(roles)}; the corpus has none to attack with")
        return [_Question(goal, wrapper, "attack") for wrapper in wrappers for goal in self.corpus.harmful.test]

    def _wrapped_benign(self) -> list[_Question]:
        prompts, wrappers = self.corpus.benign.test, self.corpus.wrappers
        to_use_all = -(-len(wrappers) // len(prompts))
        each = min(len(wrappers), max(self.wraps_per_benign, to_use_all))
        dealt = [
            (prompt, (index * each + turn) % len(wrappers))
            for index, prompt in enumerate(prompts)
            for turn in range(each)
        ]
        return [_Question(prompt, wrappers[chosen], "benign_wrapped") for prompt, chosen in dealt]

    def _ask(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[_Question], label: str
    ) -> list[Row]:
        limits = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        replies = reply(model, tokenizer, [question.text for question in questions], label=label, **limits)
        return [
            Row(
                prompt=question.prompt.id,
                wrapper=question.wrapper.id if question.wrapper else None,
                family=question.wrapper.family if question.wrapper else None,
                role=question.wrapper.role if question.wrapper else None,
                group=question.group,
                verdict=self.judge(text),
                degenerate=is_degenerate(text),
            )
            for question, text in zip(questions, replies, strict=True)
        ]


def attack_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Attack success per family and per role, from the rows of group "attack"; roles without rows are left out."""
    attacks = [row for row in rows if row.group == "attack"]
    families = sorted({row.family for row in attacks if row.family is not None})
    measured: dict[str, Any] = {"asr": {}}
    for family in families:
        verdicts = [row.verdict for row in attacks if row.family == family]
        measured["asr"][family] = metrics.attack_success(verdicts, name=f"asr {family}").as_dict()
    for role in ROLES:
        verdicts = [row.verdict for row in attacks if row.role == role]
        if verdicts:
            measured[f"asr_{role}"] = metrics.attack_success(verdicts, name=f"asr_{role}").as_dict()
    return measured


def _verdicts(rows: Sequence[Row], group: Group) -> list[Verdict]:
    return [row.verdict for row in rows if row.group == group]


def _wrapped_compliance(rows: Sequence[Row], name: str) -> dict[str, Any]:
    return metrics.compliance([row.verdict for row in rows], name=name).as_dict()
