"""A run folder belongs to one run at a time."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from filelock import FileLock, Timeout

from data_prep.errors import UserError


class Lock:
    """An exclusive lock on a file, which holds the process id of its holder.

    The system frees it when the process ends, however it ends.
    """

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    @classmethod
    def take(cls, path: Path, held: str) -> Lock:
        """Lock `path`, or `UserError` with the line `held`, in which `{pid}` stands for the holder.

        A file at `path` that no lock of ours can be is left as it is, and refused.
        """
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path}: is no file, expected the lock of a run or nothing; remove it")
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(held.format(pid=_holder(path) or "unknown")) from None
        if path.stat().st_size and _holder(path) is None:
            lock.release()
            raise UserError(f"{path}: holds something else than a process id, so it is no lock of a run; remove it")
        path.write_text(str(os.getpid()), encoding="ascii")
        return cls(lock)

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        self._lock.release()


def _holder(path: Path) -> str | None:
    """The process id in a lock file, None where it holds none."""
    with path.open("rb") as file:
        found = file.read(32).strip()
    return found.decode() if found.isdigit() and len(found) < 20 else None
