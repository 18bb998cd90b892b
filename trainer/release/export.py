"""Write the repaired model as a stock checkpoint: the base's folder with other values in the tensors that changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from trainer.model.file_names import FileNames, hub_names, own_names
from trainer.model.weight_files import INDEX, SINGLE, CheckpointFiles, bits
from trainer.recipe.sections import ExportSection
from trainer.release.places import held_alike
from trainer.release.rewrite import copy_other_files, whole_folder, write_like
from trainer.runtime.console import say
from trainer.runtime.files import tensor_errors_as_oserror, write_tensors

CONFIG = "config.json"


def export_checkpoint(model: PreTrainedModel, base: Path, folder: Path, section: ExportSection | None = None) -> None:
    """Write a fused model as its base's folder, whole or not at all.

    Every file of the base is there: tensors that the model class does not load, processor, tokenizer, licence. Weight
    files keep the base's names, types and cut. Of a tensor that the model changed exactly the changed values are
    written, in the type that the base stores it in; everything else is the base's bytes. Besides the model, one layer
    and one tensor are held in memory.

    A base in another format (packed experts, older names) cannot be kept: its weights are written as transformers
    writes them, with the model's own configuration; what the base stores as the model holds it keeps its type, and its
    bits where nothing changed. The other files are the base's in either case.

    Args:
        section: says how large a weight file may be that cannot be cut as the base's.

    Raises:
        OSError: disk full or not writable; a checkpoint written before stays as it was.
    """
    section = section or ExportSection()
    with CheckpointFiles(base) as before, whole_folder(folder) as partial:
        names = _names_in(model, before)
        if names is None:
            say("export: the base is stored in another format, so its weights are written in the present one")
            _write_model(model, partial, section.max_shard_size, before)
            own = (partial / CONFIG).read_bytes()
            copy_other_files(base, partial)
            (partial / CONFIG).write_bytes(own)
            return
        if "max_shard_size" in section.model_fields_set:
            say("export.max_shard_size: has no effect here; the weight files are cut as the base's are")
        for file in before.files:
            write_like(base / file, partial / file, _edited(before, names))
        if before.index is not None:
            shutil.copyfile(base / INDEX, partial / INDEX)
        copy_other_files(base, partial)


def _names_in(model: PreTrainedModel, base: CheckpointFiles) -> FileNames | None:
    """How the base names the model's tensors: as the Hub or as the model does; None where it does neither."""
    absent = set(getattr(model, "all_tied_weights_keys", {})) | set(model._keys_to_ignore_on_save or ())
    # A base may hold a tied weight twice: then both are written.
    wanted = [name for name in model.state_dict() if name not in absent or name in base.file_of]
    for naming in (hub_names, own_names):
        names = naming(model, wanted)
        if all(name in base.file_of and base.shape(name) == list(new.shape) for name, new in names.shapes.items()):
            return names
    return None


def _edited(base: CheckpointFiles, names: FileNames) -> Callable[[str], Tensor]:
    """A tensor of the base with the values that the model changed, by its name."""

    def tensor(name: str) -> Tensor:
        old = base.tensor(name)
        return old if name not in names.shapes else _with_changes(old, names.tensor(name).cpu())

    return tensor


def _with_changes(old: Tensor, new: Tensor) -> Tensor:
    """The base's tensor with the values that the model changed, in the base's type."""
    # Compared as the model holds it: what it did not change keeps the base's bits, also of a wider type.
    differs = bits(old.to(new.dtype)) != bits(new)
    return torch.where(differs, new.to(old.dtype), old) if bool(differs.any()) else old


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    section: ExportSection | None = None,
) -> None:
    """Write a model and its tokenizer without a base to go by, whole or not at all.

    The folder loads with `from_pretrained` without this project: transformers turns fused experts back into the Hub's
    format, bit for bit. Besides the model, one shard and one layer are held in memory; its own `save_pretrained` holds
    a second copy of most experts.

    Args:
        section: says how large a weight file may be; None: as a recipe that says nothing.

    Raises:
        OSError: disk full or not writable; a checkpoint written before stays as it was.
    """
    with whole_folder(folder) as partial:
        _write_model(model, partial, (section or ExportSection()).max_shard_size)
        tokenizer.save_pretrained(partial)


def _write_model(
    model: PreTrainedModel, folder: Path, max_shard_size: str, base: CheckpointFiles | None = None
) -> None:
    """The configuration and the tensors that `save_pretrained` would write, these layer by layer.

    Those that `base` holds, under whatever name, are written in its type.
    """
    with tensor_errors_as_oserror(folder):
        model.save_pretrained(folder, state_dict={})  # the configuration; of weights an empty file
        (folder / SINGLE).unlink(missing_ok=True)
        _write_weights(model, folder, max_shard_size, base)


def _write_weights(model: PreTrainedModel, folder: Path, max_shard_size: str, base: CheckpointFiles | None) -> None:
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    names = hub_names(model, remove_tied_weights_from_state_dict(state, model))
    plan = split_torch_state_dict_into_shards(
        names.shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    of_base: dict[str, str] = {}
    if base is not None:
        of_base = {theirs: ours for ours, theirs in held_alike(model, base.file_of, names.shapes).values()}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for name in names.by_layer:
        file = plan.tensor_to_filename[name]
        value = names.tensor(name).contiguous()
        if base is not None and name in of_base and base.shape(of_base[name]) == list(value.shape):
            value = _with_changes(base.tensor(of_base[name]), value.cpu())
        waiting[file][name] = value
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            write_tensors(folder / file, waiting.pop(file), {"format": "pt"})
    assert not waiting, "every planned tensor is made by some layer"
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
