"""Load a model and its tokenizer as a recipe names them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from data_prep.errors import UserError
from trainer.model.config import cannot_be_built, check_generation, read_config
from trainer.model.tokenizer import read_tokenizer
from trainer.model.weight_files import CheckpointFiles, local_folder
from trainer.model.whole_checkpoint import problem, refuse_incomplete, refuse_not_finite
from trainer.recipe.sections import ModelSection

BUILDING_FAILS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
)
"""What transformers' and torch's code raises over values of a configuration that it does not expect."""

if not sys.stderr.isatty():
    logging.disable_progress_bar()  # off a terminal every redraw would be a line of the log


def load(section: ModelSection, device: torch.device | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, whole on `device` (None: this process's own), and its tokenizer.

    A model that the recipe wants quantised is loaded as it is, on the CPU: critical experts are copies of unquantised
    tensors, so `trainer.moe.quantised` packs the rest after the split. A checkpoint published in MXFP4 (gpt-oss) is
    loaded in bfloat16, since packed experts cannot be split.

    Raises:
        UserError: as `read_tokenizer`; weights in a quantised format other than MXFP4.
        OSError: transformers' own message where files are missing or the Hub cannot be reached.
    """
    tokenizer = read_tokenizer(section)
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    model = read_model(
        section.name_or_path, dtype, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    if section.quantization is not None:
        device = torch.device("cpu")
    return model.to(device or PartialState().device), tokenizer


def read_model(
    name: str | Path, dtype: torch.dtype | str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder or Hub id in evaluation mode, whole, on the CPU; one stored in MXFP4 as plain tensors.

    Raises:
        UserError: weights in another quantised format; a configuration that no model can be built from; files that
            are damaged, ambiguous, lack or misshape a tensor, or hold NaN or infinity.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    unpacked = _unpacked(str(name), config)
    with CheckpointFiles(local_folder(str(name), revision)) as files:
        files.check()
        check_generation(files.folder)
        try:
            with _quiet():
                model, info = class_of(config, trust_remote_code).from_pretrained(
                    name,
                    config=config,
                    dtype=dtype,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **unpacked,
                    **common,
                )
        except BUILDING_FAILS as error:
            # The skeleton says what is wrong with a configuration, the files what is wrong with their tensors.
            wrong = problem(skeleton(config, trust_remote_code=trust_remote_code), files)
            said = f"{type(error).__name__}: {(str(error).strip() or 'nothing said').splitlines()[0][:300]}"
            raise UserError(wrong or f"{name}: cannot be loaded by transformers: {said}") from error
        refuse_incomplete(model, files, info, packed=bool(unpacked))
        refuse_not_finite(model, files)
    if unpacked:
        # The rules of the load would name the plain tensors `..._blocks` when they are written, and nothing could load
        # them (huggingface/transformers#44983); without them those of the class hold.
        model._weight_conversions = None
    loaded: PreTrainedModel = _without_router_logits(model).eval()
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers: what it says about a load in a table is checked, or expected, here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def skeleton(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration on the meta device: tensors have shapes and no bytes.

    `UserError` for a configuration that no model can be built from.
    """
    kind = class_of(config, trust_remote_code)
    try:
        with _quiet(), torch.device("meta"):
            copied = copy.deepcopy(config)
            if kind is AutoModelForCausalLM:
                model: PreTrainedModel = kind.from_config(copied, dtype=dtype, trust_remote_code=trust_remote_code)
            else:
                model = kind._from_config(copied, dtype=dtype)
    except BUILDING_FAILS as error:
        raise cannot_be_built(config, error) from error
    return model.eval()


def hollow(section: ModelSection, dtypes: dict[str, torch.dtype]) -> PreTrainedModel:
    """The model on the CPU in memory that was never written, and so takes none, to be filled from another process.

    Args:
        dtypes: name -> type of every parameter and buffer of the model to be filled in.
    """
    config = read_config(section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    if _unpacked(section.name_or_path, config):
        del config.quantization_config
    model = skeleton(config, next(iter(dtypes.values())), trust_remote_code=section.trust_remote_code)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    assert named.keys() == dtypes.keys(), sorted(named.keys() ^ dtypes.keys())
    made = {id(held): torch.empty(held.shape, dtype=dtypes[name], device="cpu") for name, held in named.items()}
    parameters = {id(held): nn.Parameter(made[id(held)]) for held in model.parameters()}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else made[id(buffer)]
    return _without_router_logits(model)


def _without_router_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Keep a base whose config asks for router logits from turning them into a load-balancing loss in every forward.

    That loss takes the mask of the whole cache for that of the new tokens. The config stays as it is, since it is
    exported.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        model.register_forward_pre_hook(_ask_for_no_router_logits, with_kwargs=True)
    return model


def _ask_for_no_router_logits(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_router_logits": False}


def class_of(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """The class that a checkpoint names, where transformers has it: AutoModelForCausalLM drops a vision tower."""
    if trust_remote_code and getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    named = next(iter(config.architectures or []), None)
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else AutoModelForCausalLM


def _unpacked(name: str, config: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to give plain tensors of a checkpoint that is stored quantised."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return {}
    method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    if method != "mxfp4":
        raise UserError(
            f"model.name_or_path: {name!r} is stored quantised ({method}); allowed: an unquantised checkpoint, with "
            "model.quantization: 4bit or 8bit to hold it packed"
        )
    return {"quantization_config": Mxfp4Config(dequantize=True)}
