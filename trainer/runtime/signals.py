"""SIGTERM, as clusters send it before they take a node away: save what is worth saving, leave with exit code 143.

Outside of training the process ends at once, and the next start repeats the unfinished stage. Inside, the step in
progress is finished and a checkpoint is written first.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data_prep.errors import UserError

EXIT_CODE = 128 + signal.SIGTERM

_deferring = False
_requested = False


class Terminated(SystemExit):
    """The process was asked to end."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


def install() -> None:
    """Take over SIGTERM for this process; main thread only."""
    signal.signal(signal.SIGTERM, _on_signal)


def requested() -> bool:
    """Whether the signal came while it was deferred."""
    return _requested


@contextmanager
def deferred() -> Iterator[None]:
    """Only note the signal inside; the caller asks `requested` where stopping is safe. Ends with `Terminated`."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    if _requested:
        raise Terminated


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if not _deferring:
        raise Terminated


class _TimeIsUp(BaseException):
    """No `Exception`, which the block might catch."""


@contextmanager
def time_limit(seconds: int, message: str) -> Iterator[None]:
    """Raise `UserError` with `message` where the block takes longer; without effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TimeIsUp

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise UserError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
