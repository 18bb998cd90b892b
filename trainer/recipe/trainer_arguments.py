"""The trainer's own arguments inside a recipe section: which are allowed, of which type, and within which bounds.

Only arguments that do something in our stages are taken. The others are refused by name: a setting that changes
nothing would stand in the recipe as if it had.
"""

import dataclasses
import enum
import typing
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from trainer.recipe.argument_names import NOT_TAKEN, argument_names
from trainer.recipe.errors import at_key, closest, shown

INFINITE = float("inf")

# key -> (smallest, largest) value, where it is a number and the type alone would let nonsense through. The largest
# ones are far beyond use and far below what exhausts memory or never ends.
BOUNDS: dict[str, tuple[float, float]] = {
    "learning_rate": (0, INFINITE),
    "num_train_epochs": (0, 1e6),
    "max_steps": (-1, 1e9),
    "per_device_train_batch_size": (1, 65536),
    "gradient_accumulation_steps": (1, 65536),
    "weight_decay": (0, 1e6),
    "max_grad_norm": (0, INFINITE),
    "warmup_steps": (0, 1e9),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, 1),
    "max_length": (1, 2**24),
    "save_steps": (1, 1e9),
    "logging_steps": (1, 1e9),
    "torch_empty_cache_steps": (1, 1e9),
    "data_seed": (0, 2**31),
    "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_bucket_cap_mb": (1, 65536),
}

# What the stages honour, besides the keys in BOUNDS.
OTHERS_ALLOWED = frozenset(
    {
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "optim",
        "optim_args",
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "logging_strategy",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "report_to",
        "full_determinism",
        "train_sampling_strategy",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_multiprocessing_context",
        "ddp_find_unused_parameters",
        "ddp_broadcast_buffers",
        # Only with the one value that REFUSED leaves.
        "router_aux_loss_coef",
        "packing",
        "eval_packing",
        "padding_free",
        "load_best_model_at_end",
        "remove_unused_columns",
    }
)


def _reentrant(value: Any) -> bool:
    return not isinstance(value, dict) or bool(value.get("use_reentrant"))


def _truthy(value: Any) -> bool:
    return bool(value)


def _given(value: Any) -> bool:
    return True


def _takes_over(value: Any) -> bool:
    return isinstance(value, str) and any(part in value for part in ("lomo", "galore", "apollo"))


def _by_metric(value: Any) -> bool:
    return value in ("reduce_lr_on_plateau", "greedy")


_SPANS = "the loss needs the prompt and response spans of each row"
_CHECKPOINTING = "expected a mapping without use_reentrant: true; routing captured under it carries no gradient"
_REPLIES = "the loss is the method's own, on the tokens of each reply"
_DATA = "the rows come from the section data"
_MEASURED = "a stage has no evaluation loop; the section evaluate says what is measured"
_SAVED = "set save_steps; the newest checkpoint is kept until the stage is finished"
_LAUNCHED = "choose with launch.sh --engine, or an accelerate configuration"
_PUSHED = "`routealign push` publishes a finished run"

# key -> (when its value is refused, why)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "output_dir": (_given, "set run.output_dir; every stage has its own folder inside the run"),
    "seed": (_given, "set run.seed; it seeds every stage"),
    "run_name": (_given, "set run.name"),
    "do_train": (_given, "the schedule says what is trained"),
    "model_init_kwargs": (_given, "set the keys of the section model"),
    "trust_remote_code": (_given, "set model.trust_remote_code"),
    "hub_token": (_given, "log in with `hf auth login` or set HF_TOKEN; a recipe is copied into the run folder"),
    "router_aux_loss_coef": (lambda v: v != 0, "expected 0: load balancing moves every router against the repair"),
    "gradient_checkpointing_kwargs": (_reentrant, _CHECKPOINTING),
    "activation_checkpointing_kwargs": (_reentrant, _CHECKPOINTING),
    "packing": (_truthy, f"expected false: {_SPANS}"),
    "eval_packing": (_truthy, f"expected false: {_SPANS}"),
    "padding_free": (_truthy, f"expected false: {_SPANS}"),
    "load_best_model_at_end": (_truthy, "expected false: transformers does not restore fused expert weights"),
    "resume_from_checkpoint": (_given, "run the recipe again; it resumes by itself"),
    "remove_unused_columns": (_truthy, f"expected false: {_SPANS}"),
    "optim": (_takes_over, "expected an optimiser that leaves the backward pass and the shapes of the weights alone"),
    "lr_scheduler_type": (_by_metric, f"expected one that needs no metric: {_MEASURED}"),
    "neftune_noise_alpha": (_given, "noise would reach the original model too, which the repair is compared with"),
    "torch_compile": (_given, "routing is recorded by hooks, which a compiled model leaves out"),
    "dataloader_drop_last": (_given, "a last batch that is not full is dropped wherever there is a full one"),
    "disable_tqdm": (_given, "progress is a bar on a terminal and lines elsewhere"),
    "use_cpu": (_given, "a stage runs where the model is; hide the GPUs with CUDA_VISIBLE_DEVICES="),
    "auto_find_batch_size": (_given, "set per_device_train_batch_size; `routealign plan` says what fits"),
    "label_smoothing_factor": (_given, _REPLIES),
    "loss_type": (_given, _REPLIES),
    "completion_only_loss": (_given, _REPLIES),
    "assistant_only_loss": (_given, _REPLIES),
    "average_tokens_across_devices": (_given, "rows are averaged, not tokens"),
    "use_liger_kernel": (_given, _REPLIES),
    "liger_kernel_config": (_given, _REPLIES),
    "eos_token": (_given, "turns end as the model's chat template ends them"),
    "pad_token": (_given, "padding is masked; the tokenizer's own is taken"),
    "pad_to_multiple_of": (_given, "batches are padded to their longest row"),
    "chat_template_path": (_given, "the chat template is the model's own"),
    "truncation_mode": (_given, "rows are cut at their end, by max_length"),
    "shuffle_dataset": (_given, "rows are drawn in a new order in every epoch"),
    "save_strategy": (_given, _SAVED),
    "save_total_limit": (_given, _SAVED),
    "save_only_model": (_given, _SAVED),
    "save_on_each_node": (_given, _SAVED),
    "push_to_hub": (_given, _PUSHED),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "label_names"), (_given, _DATA)),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "accelerator_config"), (_given, _LAUNCHED)),
    **dict.fromkeys(("parallelism_config", "ddp_backend", "ddp_timeout"), (_given, _LAUNCHED)),
}

# key -> (the class in whose stage it works, why not in others)
ONLY_IN = {"train_sampling_strategy": ("SFTConfig", "a row holds several texts, so that it has no one length")}

# Beginning of a key -> why, where every key that begins so is refused.
REFUSED_KINDS = {
    "eval_": _MEASURED,
    "do_": _MEASURED,
    "per_device_eval": _MEASURED,
    "metric_for": _MEASURED,
    "hub_": _PUSHED,
}


def check_argument_names(arguments_class: str, given: Sequence[str], own: Sequence[str]) -> None:
    """Check flat keys against the fields of `SFTConfig` or `TrainingArguments`; imports neither.

    Raises pydantic's error for the first key that the class does not have. `own` are the section's own keys, for the
    closest match.
    """
    names = argument_names(arguments_class) if given else frozenset[str]()
    for key in given:
        if key not in names:
            taken = sorted((BOUNDS.keys() | OTHERS_ALLOWED) & names)
            allowed = f"{', '.join(own)}, and of {arguments_class} {', '.join(taken)}"
            raise at_key(key, f"unknown key{closest(key, [*own, *taken])}; allowed: {allowed}")


def check_argument_values(arguments_class: str, given: dict[str, Any]) -> None:
    """Check the values of keys that the class has.

    Raises pydantic's error for the first one that RouteAlign sets itself, that would change nothing, or whose value is
    of a wrong type or out of bounds. Imports the library only where there is something to check: that takes seconds.
    """
    if not given:
        return
    fields = _fields(arguments_class)
    taken = (BOUNDS.keys() | OTHERS_ALLOWED) & fields.keys()
    for key, value in given.items():
        refused, why = REFUSED.get(key, (None, ""))
        if refused is not None and refused(value):
            raise at_key(key, f"found {shown(value)}; {why}")
        only, why = ONLY_IN.get(key, (arguments_class, ""))
        if only != arguments_class:
            raise at_key(key, f"found {shown(value)}; {why}")
        if key not in taken:
            kinds = [reason for start, reason in REFUSED_KINDS.items() if key.startswith(start)]
            raise at_key(key, f"found {shown(value)}; {(kinds or ['it has no effect here; leave it out'])[0]}")
        problem = _type_problem(fields[key], value)
        if problem:
            raise at_key(key, f"found {shown(value)}, expected {problem}")
        _check_bounds(key, value)


def _check_bounds(key: str, value: Any) -> None:
    least, most = BOUNDS.get(key, (-INFINITE, INFINITE))
    if value is None or key not in BOUNDS:
        return
    if not value >= least:
        raise at_key(key, f"found {shown(value)}, expected at least {least:g}")
    if not value <= most:
        raise at_key(key, f"found {shown(value)}, expected at most {most:.10g}")
    if key == "max_steps" and -1 < value < 1:
        raise at_key(key, f"found {shown(value)}, expected 1 or more, or -1 for the steps of num_train_epochs")
    if key == "num_train_epochs" and value == 0:
        raise at_key(key, f"found {shown(value)}, expected more than 0")
    if key.endswith("_steps") and key != "warmup_steps" and value != int(value):
        raise at_key(key, f"found {shown(value)}, expected a whole number")


def _fields(arguments_class: str) -> dict[str, Any]:
    """Field name -> type of those fields that the class's constructor takes."""
    if arguments_class == "SFTConfig":
        from trl import SFTConfig as cls
    else:
        from transformers import TrainingArguments as cls
    types = typing.get_type_hints(cls)
    return {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init and f.name not in NOT_TAKEN}


def _type_problem(annotation: Any, value: Any) -> str:
    """What the type expects, or an empty string where the value fits or the type cannot be checked simply."""
    for member in (annotation, *typing.get_args(annotation)):
        if isinstance(member, type) and issubclass(member, enum.Enum):
            choices = [str(choice.value) for choice in member]
            return "" if value in choices else f"one of {', '.join(choices)}"
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except PydanticUserError:
        return ""  # a class of the library's own
    except ValidationError as error:
        wanted = dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in error.errors())
        return " or ".join(wanted)
    return ""
