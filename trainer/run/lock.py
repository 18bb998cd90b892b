"""A run folder belongs to one run at a time."""

from __future__ import annotations

import os
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
        """Lock `path`, or `UserError` with the line `held`, in which `{pid}` stands for the holder."""
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            pid = path.read_text(encoding="ascii", errors="replace").strip()
            raise UserError(held.format(pid=pid if pid.isdecimal() else "unknown")) from None
        path.write_text(str(os.getpid()), encoding="ascii")
        return cls(lock)

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        self._lock.release()
