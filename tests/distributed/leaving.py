"""A process that has worked with another and ends: `python -m tests.distributed.leaving OUT CODE` under a launcher.

What is torn down with the interpreter aborts here, as gloo's threads do now and then.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path

from trainer.runtime.processes import from_rank_0, leave, rank


class Late:
    """Lives to the end of the interpreter; `abort` is its own, as this module's names are gone by then."""

    abort = staticmethod(os.abort)

    def __del__(self) -> None:
        self.abort()


late = Late()

if __name__ == "__main__":
    out, code = Path(sys.argv[1]), int(sys.argv[2])
    from_rank_0(None)
    atexit.register((out / f"left-{rank()}").touch)
    if rank() == 1:
        time.sleep(1)
        (out / "late").touch()
    print("last words")
    leave(code)
