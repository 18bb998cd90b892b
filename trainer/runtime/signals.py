"""Signals: SIGTERM, as clusters send it before they take a node away, and an alarm for what may never end.

At SIGTERM a process saves what is worth saving and leaves with exit code 143.

Outside of training the process ends at once, and the next start repeats the unfinished stage. Inside, the step in
progress is finished and a checkpoint is written first.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


@contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` inside once the process has computed for longer, however busy the machine is with others.

    Python code alone can be broken off so. Off the main thread, where signals do not arrive, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise error

    former = signal.signal(signal.SIGVTALRM, on_alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
