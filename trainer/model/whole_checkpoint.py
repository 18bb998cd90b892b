"""Refuse a checkpoint from which a model would come that is not the one that was published.

transformers draws a tensor at random that a checkpoint lacks, and goes on; NaN travels silently until nothing answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.errors import UserError
from trainer.model.file_names import FileNames, hub_names, own_names
from trainer.model.weight_files import CheckpointFiles

LEFT_OUT = r"(^|\.)mtp(\.|$)"
"""Tensors of draft heads, which model classes do not load (see also layers beyond the last one)."""
_INTEGER_TYPES = re.compile(r"[IU]\d+|BOOL")


def refuse_incomplete(
    model: PreTrainedModel, files: CheckpointFiles, info: Mapping[str, Any], *, packed: bool = False
) -> None:
    """Check what `from_pretrained` says about a load.

    Args:
        info: its loading info: `missing_keys`, `unexpected_keys`, `mismatched_keys`.
        packed: the files hold packed tensors (integers, of other shapes) that were unpacked.

    Raises:
        UserError: a tensor that is missing, of another shape, stored as integers, or that the model does not know.
    """
    if info["mismatched_keys"] or info["missing_keys"]:
        raise UserError((None if packed else problem(model, files)) or _said(model, files, info))
    unknown = [name for name in sorted(info["unexpected_keys"]) if not _draft_head(model, name)]
    if unknown:
        raise UserError(f"{files.folder}: holds tensor {unknown[0]!r}, which {type(model).__name__} does not know")
    for names in () if packed else _namings(model):
        for name in sorted(names.shapes.keys() & files.file_of.keys()):
            if names.shapes[name].is_floating_point() and _INTEGER_TYPES.fullmatch(files.dtype(name)):
                raise UserError(
                    f"{files.folder / files.file_of[name]}: tensor {name!r} is stored as {files.dtype(name)}; "
                    "allowed: a floating-point type"
                )


def problem(model: PreTrainedModel, files: CheckpointFiles) -> str | None:
    """What is wrong with the files in their own names, in one line; None where they are complete.

    Args:
        model: as the configuration describes it; of its tensors only the shapes are looked at.
    """
    names = max(_namings(model), key=lambda names: len(names.shapes.keys() & files.file_of.keys()))
    wrong = _compare(model, files, names)
    return wrong[0] if wrong else None


def _namings(model: PreTrainedModel) -> list[FileNames]:
    return [hub_names(model), own_names(model)]


def _compare(model: PreTrainedModel, files: CheckpointFiles, names: FileNames) -> list[str]:
    absent = set(getattr(model, "all_tied_weights_keys", {}))
    other = [
        f"{files.folder / files.file_of[name]}: tensor {name!r} is {files.shape(name)}, by config.json it is "
        f"{list(shape.shape)}"
        for name, shape in names.shapes.items()
        if name in files.file_of and files.shape(name) != list(shape.shape)
    ]
    ignored = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ()) or r"(?!)"
    missing = [
        f"{files.folder}: holds no tensor {name!r}, which config.json asks for"
        for name in names.shapes
        if name not in files.file_of and name not in absent and not re.search(ignored, name)
    ]
    return other + missing


def _said(model: PreTrainedModel, files: CheckpointFiles, info: Mapping[str, Any]) -> str:
    """The same in the model's names, where the files are in an older format."""
    for name, found, wanted in sorted(info["mismatched_keys"], key=str):
        return f"{files.folder}: {name!r} is {list(found)} in the files, by config.json it is {list(wanted)}"
    return f"{files.folder}: holds nothing for {min(info['missing_keys'])!r} of {type(model).__name__}"


def _draft_head(model: PreTrainedModel, name: str) -> bool:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    numbers = re.findall(r"(?:^|\.)layers\.(\d+)\.", name)
    return bool(re.search(LEFT_OUT, name)) or (layers is not None and any(int(n) >= layers for n in numbers))


def refuse_not_finite(model: PreTrainedModel, files: CheckpointFiles) -> None:
    """One pass over every loaded tensor.

    Raises:
        UserError: one holds NaN or infinity, with its name in the files and the file, or the type that is too narrow.
    """
    if all(map(_finite, model.state_dict().values())):
        return
    for name in sorted(files.file_of):
        tensor = files.tensor(name)
        if tensor.is_floating_point() and not _finite(tensor):
            number = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{files.folder / files.file_of[name]}: tensor {name!r} holds NaN or infinity ({number:,} of "
                f"{tensor.numel():,} values); the checkpoint is damaged"
            )
    name = next(name for name, tensor in model.state_dict().items() if not _finite(tensor))
    dtype = str(model.dtype).removeprefix("torch.")
    raise UserError(
        f"model.dtype: {dtype} is too narrow for {name!r}, which becomes infinite; allowed: bfloat16, float32"
    )


def _finite(tensor: Tensor) -> bool:
    """Adding up finds NaN and infinity without a tensor of answers; only a sum that overflows is looked at again."""
    if not tensor.is_floating_point():
        return True
    wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.element_size() > 1 else torch.float32
    if bool(torch.isfinite(tensor.sum(dtype=wide))):
        return True
    return bool(torch.isfinite(tensor.to(wide)).all())
