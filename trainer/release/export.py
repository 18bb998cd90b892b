"""Write the repaired model as a stock checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from trainer.model.weight_files import INDEX, SINGLE
from trainer.recipe.sections import ExportSection
from trainer.runtime.files import tensor_errors_as_oserror, write_tensors


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    section: ExportSection | None = None,
) -> None:
    """Write a fused model and its tokenizer, whole or not at all.

    The folder loads with `from_pretrained` without this project: transformers turns fused experts back into the Hub's
    format, bit for bit. Besides the model, one shard and one layer are held in memory; its own `save_pretrained` holds
    a second copy of most experts.

    Args:
        section: says how large a weight file may be; None: as a recipe that says nothing.

    Raises:
        OSError: disk full or not writable; a checkpoint written before stays as it was.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tensor_errors_as_oserror(folder):
            model.save_pretrained(partial, state_dict={})  # the configuration; of weights an empty file
            _write_weights(model, partial, (section or ExportSection()).max_shard_size)
        tokenizer.save_pretrained(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_weights(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """The tensors that `save_pretrained` would write, made layer by layer."""
    (folder / SINGLE).unlink(missing_ok=True)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    state = remove_tied_weights_from_state_dict(state, model)
    names = sorted(state, key=dot_natural_key)
    shapes = {name: torch.empty_like(state[name], device="meta") for name in names}
    converted = revert_weight_conversion(model, shapes)
    # Each with storage of its own: the sizes of views would be those of what they are views of.
    planned = {name: torch.empty_like(tensor) for name, tensor in converted.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    layers = [list(group) for _, group in groupby(names, key=_layer_of)]
    apart = [name for layer in layers for name in revert_weight_conversion(model, {n: shapes[n] for n in layer})]
    if sorted(apart) != sorted(planned):
        layers = [names]  # rules that look at several layers at once
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for layer in layers:
        for name, tensor in revert_weight_conversion(model, {n: state[n] for n in layer}).items():
            file = plan.tensor_to_filename[name]
            waiting[file][name] = tensor.contiguous()
            if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                write_tensors(folder / file, waiting.pop(file), {"format": "pt"})
    assert not waiting, "every planned tensor is made by some layer"
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _layer_of(name: str) -> str:
    """Everything up to the first number in a parameter's name, or the whole name."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name
