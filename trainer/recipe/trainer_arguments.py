"""The trainer's own arguments inside a recipe section: which are allowed, and of which type."""

import dataclasses
import enum
import typing
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from trainer.recipe.errors import at_key, closest, shown


def _reentrant(value: Any) -> bool:
    return not isinstance(value, dict) or bool(value.get("use_reentrant"))


def _truthy(value: Any) -> bool:
    return bool(value)


def _given(value: Any) -> bool:
    return True


_SPANS = "the loss needs the prompt and response spans of each row"
_CHECKPOINTING = "expected a mapping without use_reentrant: true; routing captured under it carries no gradient"

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
}

# Smallest values that make sense, where the type alone would let nonsense through.
MINIMUM: dict[str, float] = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "max_length": 1,
}


def check_trainer_arguments(arguments_class: str, given: dict[str, Any], own: Sequence[str]) -> None:
    """Check flat keys against the dataclass fields of `SFTConfig` or `TrainingArguments`.

    Raises pydantic's error for the first key that the class does not have, whose type is wrong or that RouteAlign sets
    itself. `own` are the section's own keys, for the closest match. Imports the library only where there is something
    to check: that takes seconds.
    """
    if not given:
        return
    fields = _fields(arguments_class)
    for key, value in given.items():
        if key not in fields:
            allowed = f"{', '.join(own)}, and every field of {arguments_class}"
            raise at_key(key, f"unknown key{closest(key, [*own, *fields])}; allowed: {allowed}")
        refused, why = REFUSED.get(key, (None, ""))
        if refused is not None and refused(value):
            raise at_key(key, f"found {shown(value)}; {why}")
        problem = _type_problem(fields[key], value)
        if problem:
            raise at_key(key, f"found {shown(value)}, expected {problem}")
        if key in MINIMUM and value is not None and value < MINIMUM[key]:
            raise at_key(key, f"found {shown(value)}, expected at least {MINIMUM[key]:g}")


def _fields(arguments_class: str) -> dict[str, Any]:
    """Field name -> type of those fields that the class's constructor takes."""
    if arguments_class == "SFTConfig":
        from trl import SFTConfig as cls
    else:
        from transformers import TrainingArguments as cls
    types = typing.get_type_hints(cls)
    return {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init and f.name != "local_rank"}


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
