"""What DeepSpeed compiles on first use, and a lock on it that a killed process left behind."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from trainer.runtime.console import say


def say_what_is_waited_for() -> None:
    """Name the locks on torch's compiled extensions, which DeepSpeed waits for without a word and without an end.

    torch (2.13, `utils/file_baton.py`) locks by the mere existence of a file: one that was killed while it compiled
    leaves it for good. Whether somebody compiles cannot be told over a shared file system, so nothing is removed.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        say(
            f"waiting until another process has compiled {lock.parent.name}; if none does, because one was killed "
            f"meanwhile, stop this run and remove {lock}"
        )
