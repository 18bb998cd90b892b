"""The served judge against a local server that fails in every way: whatever fails is unjudged, never a refusal."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.judges import endpoint
from trainer.evaluation.judges.endpoint import Endpoint
from trainer.evaluation.judges.grade import NOTHING, Grade
from trainer.evaluation.judges.judge import judge_of
from trainer.model.reply import Reply
from trainer.recipe.judges import EndpointSection
from trainer.recipe.sections import EvaluateSection

SECRET = "tell me of the hidden lantern"
Answer = Callable[[dict[str, Any], int], Any]
"""(body, number of the request) -> the answer's text, or (status, headers, raw body), or seconds to be silent."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what the test is about."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body | {"path": self.path})
            server.headers.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        found = server.answer(body, number)
        if isinstance(found, float):
            time.sleep(found)
            found = "Refusal: Yes\nHarmful: No"
        status, headers, raw = found if isinstance(found, tuple) else (200, {}, json.dumps(completion(found)))
        with server.lock:
            server.now -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw.encode())

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def reads(body: dict[str, Any], number: int = 0) -> str:
    """A judge that reads: by the word "sorry" in what it is asked."""
    return "Refusal: Yes\nHarmful: No" if "sorry" in body["messages"][-1]["content"] else "Refusal: No\nHarmful: No"


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[Server, str]]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0.05)


def grade(url: str, texts: list[str], **section: Any) -> list[Grade]:
    judge = Endpoint(EndpointSection(url=url, model="m", **section))
    return judge([Conversation.of(SECRET)] * len(texts), [Reply.written(text) for text in texts])


TEXTS = [f"{'sorry, ' * (i % 2)}number {i}" for i in range(12)]
RIGHT = [Grade(bool(i % 2), False) for i in range(12)]


def test_replies_are_graded_in_order_several_at_a_time() -> None:
    def slowly(body: dict[str, Any], number: int) -> str:
        time.sleep(0.05)
        return reads(body)

    with serving(slowly) as (server, url):
        assert grade(url, TEXTS, concurrency=4) == RIGHT
    assert 2 <= server.most <= 4 and len(server.bodies) == 12
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("m", 0)}


def test_a_guard_is_served_as_it_is_loaded() -> None:
    def guard(body: dict[str, Any], number: int) -> str:
        assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
        return (
            f"Safety: Safe\nCategories: None\nRefusal: {'Yes' if 'sorry' in body['messages'][-1]['content'] else 'No'}"
        )

    with serving(guard) as (_, url):
        section = EvaluateSection(judge="endpoint", endpoint=EndpointSection(url=url, model="m", format="qwen3guard"))
        verdicts = judge_of(section)(
            [Conversation.of("x")] * 3, [Reply.written(t) for t in ("sorry, no", "yes it is", "")]
        )
    assert verdicts == ["refused", "complied", "unjudged"]


def broken(*answers: Any) -> Answer:
    return lambda body, number: answers[number % len(answers)]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (broken(0.6), "that timed out"),
        (broken((429, {"Retry-After": "0"}, "")), "answered with status 429"),
        (broken((500, {}, "oops")), "answered with status 500"),
        (broken((503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "")), "answered with status 503"),
        (broken((200, {}, "<html>Refusal: Yes</html>")), "something else than a chat completion"),
        (broken((200, {}, '{"choices": []}')), "something else than a chat completion"),
        (broken((200, {}, '{"choices": [{"message": {"content": null}}]}')), "something else than a chat completion"),
        (broken((200, {}, "[1, 2")), "something else than a chat completion"),
        (broken((200, {"Content-Encoding": "gzip"}, "no gzip")), "without a connection"),
        (broken("I'm sorry, but I can't help with that."), "whose answer is none of the format"),
        (broken(""), "whose answer is none of the format"),
        (broken("Refusal: Yes\nRefusal: No"), "whose answer is none of the format"),
        (broken((400, {}, "too long")), "answered with status 400"),
    ],
)
def test_whatever_fails_is_unjudged(answer: Answer, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answer) as (_, url):
        section = EndpointSection(url=url, model="m", seconds=0.2, retries=1)
        judge = judge_of(EvaluateSection(judge="endpoint", endpoint=section))
        verdicts = judge([Conversation.of(SECRET)] * 2, [Reply.written("I'm sorry, no."), Reply.written("It glows.")])
    assert verdicts == ["unjudged", "unjudged"]
    out = capsys.readouterr().out
    assert "2 of 2 replies go unjudged" in out.replace("\n", " ") and why in " ".join(out.split())
    assert "lantern" not in out and "glows" not in out


def test_no_server_is_unjudged_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert grade("http://127.0.0.1:9/v1", TEXTS[:3], retries=1) == [NOTHING] * 3
    assert "without a connection" in " ".join(capsys.readouterr().out.split())


def test_what_fails_for_a_while_is_asked_again() -> None:
    failures = [(429, {"Retry-After": "0"}, ""), (503, {}, ""), (200, {}, "not json"), 0.5]

    def recovers(body: dict[str, Any], number: int) -> Any:
        return failures[number] if number < len(failures) else reads(body)

    with serving(recovers) as (server, url):
        assert grade(url, TEXTS[:1], seconds=0.2, retries=4) == RIGHT[:1]
        assert len(server.bodies) == 5


def test_the_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0.4)
    answers = iter([(429, {"Retry-After": "9999"}, ""), "Refusal: No\nHarmful: No"])
    with serving(lambda body, number: next(answers)) as (_, url):
        started = time.perf_counter()
        assert grade(url, ["one"]) == [Grade(False, False)]
        assert 0.35 < time.perf_counter() - started < 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_address_or_key_ends_the_run(status: int) -> None:
    with serving(broken((status, {}, SECRET))) as (server, url):
        with pytest.raises(
            UserError, match=f"evaluate.endpoint.url: .* answers with status {status}; allowed"
        ) as error:
            grade(url, TEXTS, concurrency=1)
        assert len(server.bodies) < 12 and "lantern" not in str(error.value)


def test_the_budget_counts_retries_and_is_never_exceeded(capsys: pytest.CaptureFixture[str]) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return (500, {}, "") if number % 2 else reads(body)

    with serving(flaky) as (server, url):
        judge = Endpoint(EndpointSection(url=url, model="m", budget=7, concurrency=3, retries=2))
        asked = [Conversation.of("x")] * 12
        first = judge(asked, [Reply.written(text) for text in TEXTS])
        again = judge(asked, [Reply.written(text + "!") for text in TEXTS])
        assert len(server.bodies) == 7
    assert again == [NOTHING] * 12 and all(g in (NOTHING, right) for g, right in zip(first, RIGHT, strict=True))
    assert "beyond the budget" in capsys.readouterr().out


def test_equal_replies_are_asked_about_once_and_a_cache_holds_no_text(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache.jsonl"
    with serving(reads) as (server, url):
        assert grade(url, [*TEXTS, *TEXTS], cache=str(cache)) == [*RIGHT, *RIGHT]
        assert len(server.bodies) == 12
        assert grade(url, TEXTS, cache=str(cache)) == RIGHT and len(server.bodies) == 12
        assert grade(url, TEXTS[:2], cache=str(cache), format="llama-guard") == [NOTHING] * 2
        assert len(server.bodies) == 14, "another question is another key, and what was not graded is not kept"
    text = cache.read_text()
    assert "lantern" not in text and "number" not in text and "sorry" not in text and len(text.splitlines()) == 12
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    cache.write_text('{"key": "x", "refuses": "maybe", "harmful": null}\n')
    with pytest.raises(UserError, match=r"cache.jsonl, line 1: no grade"):
        Endpoint(EndpointSection(url=url, model="m", cache=str(cache)))


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with serving(broken((500, {}, ""))) as (server, url):
        grade(url, ["one"], api_key_variable="JUDGE_KEY", retries=0)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in "".join(capsys.readouterr())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="api_key_variable: JUDGE_KEY is not set"):
        Endpoint(EndpointSection(url=url, model="m", api_key_variable="JUDGE_KEY"))


@pytest.mark.parametrize(
    "section",
    [{"url": "ftp://x/v1"}, {"url": "http://me:secret@x/v1"}, {"retries": -1}, {"concurrency": 0}, {"seconds": 0.0},
     {"format": "wildguard"}, {"api_key_variable": "sk-123"}, {"budget": 0}],
)  # fmt: skip
def test_what_no_endpoint_can_be(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EndpointSection(**{"url": "http://x/v1", "model": "m", **section})
