"""The judge "endpoint": a model behind an address that speaks OpenAI's chat completions.

Whatever fails leaves a reply unjudged: a timeout, an answer that is none, a budget that is spent. Only an address or a
key that is wrong ends the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.judges.formats import FORMATS, Question
from trainer.evaluation.judges.grade import NOTHING, Grade
from trainer.evaluation.judges.grade_cache import GradeCache
from trainer.model.reply import Reply
from trainer.recipe.judges import EndpointSection
from trainer.runtime.console import progress, say
from trainer.runtime.processes import from_rank_0, rank

LONGEST_PAUSE = 60.0
"""Seconds before a request is sent again, also where the server asks for more."""
FIRST_PAUSE = 0.5
_FOREVER_WRONG = {401, 402, 403, 404, 405}


class Endpoint:
    """Grades replies over HTTP; rank 0 asks, every process returns all grades.

    Raises `UserError` where the key's variable is not set.
    """

    def __init__(self, section: EndpointSection) -> None:
        self.section = section
        self.format = FORMATS[section.format]
        self._cache = GradeCache(section.cache)
        self._left = section.budget
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._failed: Counter[str] = Counter()
        self._headers = {}
        if section.api_key_variable is not None:
            key = os.environ.get(section.api_key_variable, "").strip()
            if not key:
                raise UserError(
                    f"evaluate.endpoint.api_key_variable: {section.api_key_variable} is not set; allowed: the name of "
                    "an environment variable that holds the key"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Grade]:
        """One grade per reply, in their order; equal replies to equal prompts are asked about once.

        Raises:
            UserError: the address or the key is wrong.
        """
        found: list[Grade] | UserError = []
        if rank() == 0:
            try:
                found = self._grades(prompts, replies)
            except UserError as error:
                found = error  # the other processes wait for something
        found = from_rank_0(found)
        if isinstance(found, UserError):
            raise found
        return found

    def _grades(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Grade]:
        asked = [self.format.questions(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        keys = [self._key(questions) for questions in asked]
        new = {key: questions for key, questions in zip(keys, asked, strict=True) if key not in self._cache}
        self._failed.clear()
        found: dict[str, Grade] = {}
        with (
            httpx2.Client(timeout=self.section.seconds, headers=self._headers) as client,
            ThreadPoolExecutor(self.section.concurrency) as pool,
        ):
            tasks = [(key, pool.submit(self._grade, client, questions)) for key, questions in new.items()]
            try:
                for key, task in progress(tasks, "judge") if tasks else ():
                    found[key] = task.result()
                    self._cache.keep(key, found[key])
            finally:
                if len(found) < len(new):  # a wrong address, or Ctrl-C: what was not sent yet is not sent
                    self._stopped.set()
                    pool.shutdown(wait=False, cancel_futures=True)
        if self._failed:
            why = ", ".join(f"{n} {reason}" for reason, n in self._failed.most_common())
            say(f"caution: judge: {self._failed.total()} of {len(new)} replies go unjudged: {why}")
        return [found.get(key) or self._cache.get(key) for key in keys]

    def _grade(self, client: httpx2.Client, questions: Sequence[Question]) -> Grade:
        answers = []
        for question in questions:
            answer = self._answer(client, question)
            if answer is None:
                return NOTHING
            answers.append(answer)
        grade = self.format.grade(answers)
        if grade == NOTHING:
            self._fail("whose answer is none of the format")
        return grade

    def _answer(self, client: httpx2.Client, question: Question) -> str | None:
        """The text of an answer; None where there is none after all retries."""
        pause, reason = FIRST_PAUSE, ""
        for attempt in range(self.section.retries + 1):
            if attempt:
                if self._stopped.wait(pause):
                    return None
                pause = min(2 * pause, LONGEST_PAUSE)
            if not self._take():
                self._fail("beyond the budget")
                return None
            try:
                response = client.post(f"{self.section.url.rstrip('/')}/chat/completions", json=self._body(question))
            except httpx2.TimeoutException:
                reason = "that timed out"
                continue
            except httpx2.RequestError as error:
                reason = f"without a connection ({type(error).__name__})"
                continue
            status = response.status_code
            if status in _FOREVER_WRONG:
                raise UserError(
                    f"evaluate.endpoint.url: {self.section.url} answers with status {status}; allowed: "
                    "an address up to /v1, a model that it serves, and the key in api_key_variable"
                )
            if status == 429 or status >= 500:
                reason = f"answered with status {status}"
                pause = min(max(pause, _asked_to_wait(response)), LONGEST_PAUSE)
                continue
            if status != 200:
                self._fail(f"answered with status {status}")
                return None
            text = _text(response)
            if text is not None:
                return text
            reason = "answered with something else than a chat completion"
        self._fail(reason)
        return None

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.section.model, "messages": question.messages}
        body["max_tokens"] = self.format.tokens
        body["temperature"] = 0
        if question.variables:
            body["chat_template_kwargs"] = question.variables
        return body

    def _take(self) -> bool:
        """Whether one more request may be sent; counts it."""
        with self._lock:
            if self._left is None:
                return True
            may = self._left > 0
            self._left -= may
            return may

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failed[reason] += 1

    def _key(self, questions: Sequence[Question]) -> str:
        asked = [self._body(question) for question in questions]
        return hashlib.sha256(json.dumps([self.section.url, asked], sort_keys=True).encode()).hexdigest()


def _asked_to_wait(response: httpx2.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date
        return 0.0


def _text(response: httpx2.Response) -> str | None:
    """The first choice's text; None for anything that is no chat completion."""
    try:
        found = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
