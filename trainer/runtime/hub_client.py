"""What the Hub may do to us: huggingface_hub waits for ever where a call sets no limit, and believes every answer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils._http import default_client_factory

from data_prep.errors import UserError
from trainer.runtime.redaction import without_secrets

SECONDS = 30.0
"""For connecting, and for each wait for an answer or a part of one, where a call sets no limit of its own."""

LONGEST_WAIT = 60
"""Seconds that the Hub may ask to wait before a request is tried again."""

_BUSY = "another conflicting operation is in progress"


NOT_UNDERSTOOD = (LookupError, TypeError, AttributeError, ValueError, AssertionError, RecursionError)
"""What huggingface_hub raises of an answer that it takes apart without looking: a proxy's page, a list, a key less."""


class HubSilentError(OSError):
    """The Hub does not answer, or not now; unlike a timeout of the library it is not tried again."""


def limit_requests() -> None:
    """Give every request of huggingface_hub a limit, from now on and in this process."""
    set_client_factory(_client)


def not_understood(name: str, error: BaseException) -> UserError:
    """The error for an answer about a repository that is none; returned, not raised."""
    what = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
    return UserError(
        f"{name}: the Hub's answer cannot be understood ({what}); allowed: the JSON of its API, found at "
        f"{constants.ENDPOINT}"
    )


@contextmanager
def answers_understood(name: str) -> Iterator[None]:
    """Turn what the Hub answers that is no answer into a `UserError`; other errors of its say what they are."""
    try:
        yield
    except (UserError, OSError):
        raise
    except HTTPError as error:
        raise UserError(f"{name}: the Hub cannot be reached: {without_secrets(str(error))}") from error
    except NOT_UNDERSTOOD as error:
        raise not_understood(name, error) from error


def _client() -> Any:
    client = default_client_factory()
    # On the object, because the class is that of whichever library huggingface_hub uses.
    client.send = _limited(client.send)  # type: ignore[method-assign]
    return client


def _limited(send: Callable[..., Any]) -> Callable[..., Any]:
    busy_since: list[float] = []

    def limited(request: Any, **options: Any) -> Any:
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            name: SECONDS if given.get(name) is None else given[name] for name in ("connect", "read", "write", "pool")
        }
        try:
            response = send(request, **options)
        except HTTPError as error:
            # Reads are answered from the cache after a timeout, and pieces of a large file sent again: as they are.
            if request.method != "POST" or "Timeout" not in type(error).__name__:
                raise
            raise HubSilentError(
                f"no answer from {request.url.host} within {SECONDS:.0f} s; try again later"
            ) from error
        _refuse_long_wait(response)
        if request.method == "POST" and response.status_code == 409 and _BUSY in response.text:
            # huggingface_hub asks again at once, for as long as this is the answer.
            busy_since.append(time.monotonic())
            if busy_since[-1] - busy_since[0] > SECONDS:
                raise HubSilentError(f"{request.url.host} is busy with another operation of yours; try again later")
            time.sleep(min(1.0, SECONDS / 4))
        else:
            busy_since.clear()
        return response

    return limited


def _refuse_long_wait(response: Any) -> None:
    if response.status_code not in (429, 503):
        return
    limit = re.search(r";\s*t\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
    asked = limit.group(1) if limit else response.headers.get("retry-after", "")
    if asked.isdecimal() and int(asked) > LONGEST_WAIT:
        raise HubSilentError(f"the Hub asks to wait {int(asked)} s; try again then")
