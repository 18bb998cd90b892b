"""A folder that is there as a whole or not at all, and takes nobody's place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.errors import UserError


def check_new(out: Path, option: str) -> None:
    """`UserError`, which names the option, unless `out` can become a new folder: nothing is there, or an empty one."""
    allowed = "allowed: a folder that does not exist yet"
    if out.name in ("", "..") or "\0" in str(out):
        raise UserError(f"{option}: found {str(out)!r}, which names no new folder; {allowed}")
    try:
        above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
        link, exists = out.is_symlink(), out.exists()
    except OSError as error:
        raise UserError(
            f"{option}: found {str(out)!r}, which names no new folder ({error.strerror}); {allowed}"
        ) from error
    if link:
        raise UserError(f"{option}: {out} exists already, as a link; {allowed}")
    if not above.is_dir():
        raise UserError(f"{option}: found {str(out)!r}, but {above} is no folder; {allowed}")
    if exists and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{option}: {out} exists already; {allowed}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder of our own beside `out`, under a name that nobody has; at the end it becomes `out`.

    Where anything was raised, nothing is left behind; nothing of others is ever removed. `OSError` where it cannot be
    written, or `out` was filled meanwhile.
    """
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        private = Path(tempfile.mkdtemp(prefix=".routealign-", dir=out.parent))
        try:
            content = private / "new"
            content.mkdir()  # mkdtemp's own folder is closed to others; this one is as open as any new folder
            yield content
            content.replace(out)
            done = True
        finally:
            shutil.rmtree(private)
    finally:
        if not done:
            with suppress(OSError):  # others may have put something there
                for parent in made:
                    parent.rmdir()
