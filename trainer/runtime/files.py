"""Files: written whole or not at all, and hashed."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` at the end, if nothing was raised.

    A reader sees the old file or the new one, never a half. `OSError` names `path` where the disk is full, `UserError`
    where it is a folder.
    """
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path}: is a folder, expected a file or nothing; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # A failed write names no file, and "no space left" without one helps nobody.
            raise OSError(error.errno, error.strerror or "cannot be written", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file as a whole or leave what was there; text as UTF-8. `OSError` names the file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def tensor_errors_as_oserror(path: Path) -> Iterator[None]:
    """Turn safetensors' own error for a failed write (a full disk, say) into an `OSError` that names the path."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file as a whole or leave what was there. `OSError` names the file."""
    with replacing(path) as temporary, tensor_errors_as_oserror(path):
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as they may read any new file.

    safetensors 0.8 gives every file mode 0600 (safetensors/safetensors#782); plain `save_file` when it is mended.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def sha256(path: Path) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


HASHED_WHOLE = 256 * 2**20
"""Files up to this size (bytes) are hashed; of larger ones, weights mostly, name, size and time must do."""


def fingerprint(name: str) -> str:
    """What tells a changed file or folder (its own files, not those below) from the former one; empty for no path."""
    path = Path(name)
    parts = []
    for file in sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []:
        if file.is_file():
            stat = file.stat()
            small = stat.st_size <= HASHED_WHOLE
            parts.append(f"{file.name} {sha256(file) if small else (stat.st_size, stat.st_mtime_ns)}")
    return "\n".join(parts)
