"""Safetensors checkpoints on disk, read tensor by tensor.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Pickled weights
are never opened: reading one can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl", ".pickle")
"""Endings of files that hold weights, in any format."""

# Of a repository on the Hub. Top level only: subfolders hold other formats of the same weights.
_NEEDED = [SINGLE, "*-of-*.safetensors", INDEX, "config.json", "generation_config.json"]
_OTHERS = ["*.json", "*.jinja", "*.txt", "*.md", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckpointFiles:
    """The tensors of a checkpoint folder by name, or of one `file` in it; only what is asked for is read.

    A context manager. `file_of`: tensor name -> file name. `index`: of a sharded checkpoint, parsed; else None.

    Raises:
        UserError: no safetensors checkpoint in the folder, a missing, damaged or truncated file.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self.folder = folder
        self._opened = ExitStack()
        self._handles: dict[str, Any] = {}
        self.index = _read_index(folder) if file is None else None
        if self.index is not None:
            self.file_of: dict[str, str] = dict(self.index["weight_map"])
        else:
            file = file or SINGLE
            self.file_of = dict.fromkeys(self._handle(file).keys(), file)

    @property
    def files(self) -> list[str]:
        """File names, sorted."""
        return sorted(set(self.file_of.values()))

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor in memory of its own, on the CPU."""
        try:
            return self._handle(self.file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self.file_of[name]}: cannot read tensor {name!r}: {error}") from error

    def mapped(self, name: str) -> Tensor:
        """One tensor as a view of the file, read when it is used; the file must stay as it is meanwhile."""
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    def dtype(self, name: str) -> str:
        """The type of one tensor as safetensors calls it: F32, BF16, U8 ..."""
        found: str = self._handle(self.file_of[name]).get_slice(name).get_dtype()
        return found

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor."""
        found: list[int] = self._handle(self.file_of[name]).get_slice(name).get_shape()
        return found

    def check(self) -> CheckpointFiles:
        """Open every file and prove that no other reader could find other weights in this folder.

        Raises:
            UserError: a missing, damaged or truncated file; an index beside a single file that it does not name, or
                that disagrees with what its files hold.
        """
        named: dict[str, set[str]] = defaultdict(set)
        for name, file in self.file_of.items():
            named[file].add(name)
        if self.index is not None and SINGLE not in named and (self.folder / SINGLE).is_file():
            raise UserError(
                f"{self.folder}: holds {SINGLE} beside {INDEX}, which names {self.files[0]}; it is not clear which "
                "weights are meant; remove one of the two"
            )
        if self.index is not None and not isinstance(self.index.get("metadata"), dict):
            raise UserError(f"{self.folder / INDEX}: holds no 'metadata', which transformers asks for; allowed: {{}}")
        every = {file: set(self._handle(file).keys()) for file in self.files}
        for file, held in every.items():
            if held != named[file]:
                name = min(held ^ named[file])
                where = f"holds tensor {name!r}, which" if name in held else f"holds no tensor {name!r}, but"
                does = "does not place there" if name in held else "places it there"
                raise UserError(f"{self.folder / file}: {where} {INDEX} {does}; index and weights must agree")
        return self

    def metadata(self, file: str) -> dict[str, str] | None:
        """The text metadata in a file's header, None where it has none."""
        found: dict[str, str] | None = self._handle(file).metadata()
        return found

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            try:
                # pread: mapped pages would count as this process's memory until the file is closed.
                opened = safe_open(path, "pt", backend="pread")
            except FileNotFoundError:
                raise UserError(f"{path}: missing; the checkpoint is not whole") from None
            except SafetensorError as error:
                raise UserError(f"{path}: damaged or truncated: {error}") from error
            self._handles[file] = self._opened.enter_context(opened)
        return self._handles[file]

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()
        self._opened.close()


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.is_file():
        if (folder / SINGLE).is_file():
            return None
        others = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHTS)
        found = f"found {', '.join(others[:3])}" if others else "found no weights"
        raise UserError(f"{folder}: {found}; expected {SINGLE} or {INDEX} (pickled weights are not read)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index["weight_map"].items()
        wrong = next((file for _, file in names if not is_weight_file(file)), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not an index of a checkpoint: {type(error).__name__}: {error}") from error
    if wrong is not None:
        raise UserError(f"{path}: names the file {wrong!r}; allowed: *.safetensors in the same folder")
    return dict(index)


def is_weight_file(name: object) -> bool:
    """Whether this is the plain name of a safetensors file, with no way out of its folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def local_folder(name_or_path: str, revision: str | None = None, *, others: bool = False) -> Path:
    """The folder of a checkpoint: as named, or its snapshot from the Hub (downloaded where it is not cached).

    Args:
        others: from the Hub also tokenizer, card and licence, not only what training has loaded anyway.

    Raises:
        UserError: neither a folder nor a repository that can be reached.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"{name_or_path}: no folder here and no Hub id; allowed: a folder, or owner/name")
    try:
        wanted = [*_NEEDED, *_OTHERS] if others else _NEEDED
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name_or_path}: no such folder here, and not to be had from the Hub: {first}") from error


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns as integers of the same size, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def digest(tensor: Tensor) -> str:
    """Hex sha256 over the bytes of a tensor's values in row-major order."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
