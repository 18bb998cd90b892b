"""The command, killed at a chosen moment: `python -m tests.distributed.killing module:name:call:signal run RECIPE`.

Rank 0 sends itself the signal (KILL, TERM) right before the given call of a function; the others are left alone.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any

from trainer.runtime.processes import rank


def arm(point: str) -> None:
    module_name, path, call, kind = point.split(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def doomed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call):
            os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
        return original(*args, **kwargs)

    setattr(owner, name, doomed)


if __name__ == "__main__":
    from trainer.cli.app import main

    if rank() == 0:
        arm(sys.argv[1])
    main(sys.argv[2:])
