"""A folder like the base's: the same files, in which some tensors have other values.

An export and an applied patch are both written here, so that they are the same folder, file by file. A weight file
keeps the base's header, byte for byte: names, types, order and metadata of its tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trainer.model.weight_files import WEIGHTS
from trainer.runtime.files import replacing

TEMPLATES = "additional_chat_templates"
"""The one folder of a checkpoint that loaders read besides its top level."""
_LENGTH = 8
"""Bytes at the beginning of a safetensors file that say how long its header is."""


def write_like(base: Path, out: Path, tensor: Callable[[str], Tensor]) -> None:
    """Write a weight file with the header of another one; one tensor is in memory at a time.

    Args:
        tensor: gives each tensor by name, of the type and shape that it has in `base`.

    Raises:
        OSError: disk full or not writable; names the file.
    """
    with base.open("rb") as source, replacing(out) as temporary, temporary.open("wb") as target:
        header = _header(source)
        source.seek(0)
        target.write(source.read(_LENGTH + len(header)))
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            value = tensor(name)
            # An empty tensor has no bytes, and no type that a view could be taken of.
            content: memoryview | bytes = (
                value.contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b""
            )
            assert len(content) == end - start, f"{name}: {len(content)} bytes for {end - start}"
            target.write(content)


def _header(file: BinaryIO) -> bytes:
    return file.read(int.from_bytes(file.read(_LENGTH), "little"))


def other_files(folder: Path) -> list[str]:
    """The files of a checkpoint that hold no weights, as paths inside it, sorted: configuration, tokenizer, processor,
    chat templates, licence, code. Neither hidden files nor indexes of weights, and of subfolders only the one that
    loaders read.
    """
    found = [path for path in folder.iterdir() if path.is_file()]
    templates = folder / TEMPLATES
    found += [path for path in templates.glob("*.jinja") if path.is_file()] if templates.is_dir() else []
    kept = [path for path in found if path.suffix not in WEIGHTS and not path.name.endswith(".index.json")]
    return sorted(path.relative_to(folder).as_posix() for path in kept if not path.name.startswith("."))


def copy_other_files(base: Path, out: Path) -> None:
    """Copy the base's other files, byte for byte; what is a link in a cache becomes a file."""
    for name in other_files(base):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, out / name)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end; if something was raised, `out` stays as it was."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
