"""The types and bounds of what is read from a run folder, as far as the report, the card and the table rely on them.

Keys that are not named here may stand in the files and are not looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError

from trainer.moe.json_files import first_problem
from trainer.reporting.figures import is_rate

FINITE = sys.float_info.max
Natural = Annotated[int, Field(ge=0)]
Index = Annotated[int, Field(ge=0, lt=65536)]
Share = Annotated[float, Field(ge=0, le=1)]
Change = Annotated[float, Field(ge=-1, le=1)]
Amount = Annotated[float, Field(ge=0)]


class Known(BaseModel):
    """An object with some known keys, each optional unless it has no default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())


class Rate(Known):
    """R of docs/evaluation-json.md."""

    rate: Share
    n: Annotated[int, Field(ge=1)]
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]
    unjudged: Natural = 0


def _rates_in(found: dict[str, Any]) -> dict[str, Any]:
    """Check every R in an M, at any depth."""
    for name, value in _objects(found):
        if is_rate(value):
            try:
                Rate.model_validate(value)
            except ValidationError as error:
                raise ValueError(f"{name}.{first_problem(error)}") from None
    return found


def _objects(found: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield f"{at}{name}", value
            yield from _objects(value, f"{at}{name}.")


Metrics = Annotated[dict[str, Any], AfterValidator(_rates_in)]


class Drift(Known):
    layer: Index
    flip_rate: Share
    kl: float


class Diagnostics(Known):
    """D, what the methods have in common."""

    router_restore_gap: Change | None = None
    topk_flip_rate: Share | None = None
    gate_weights_changed: float | None = None
    experts_changed: Natural | None = None
    experts_total: Natural | None = None
    shared_experts_changed: Natural | None = None
    untouched_identical: bool | None = None
    drift_per_layer: list[Drift] | None = None
    random_control: Metrics | None = None
    attention_control: Metrics | None = None
    bottom_control: Metrics | None = None
    steering_baseline: Metrics | None = None


class Paired(Known):
    """C, one figure's."""

    difference: Change
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]
    p: Share


class Evaluation(Known):
    before: Metrics
    after: Metrics
    diagnostics: Diagnostics | None = None
    changes: dict[str, Paired] | None = None


class Stage(Known):
    status: str = ""
    seconds: Amount | None = None
    peak_memory_mb: Amount | None = None
    peak_gpu_memory_mb: Amount | None = None


class Manifest(Known):
    name: str | None = None
    created: str | None = None
    seed: Natural | None = None
    versions: dict[str, str] | None = None
    stages: dict[str, Stage] | None = None


class Member(Known):
    layer: Index
    expert: Index
    score: float | None = None
    stability: Share | None = None


class ExpertSet(Known):
    members: list[Member] | None = None
    num_layers: Natural | None = None
    num_experts: Natural | None = None
    experts_per_layer: dict[Index, Natural] | None = None
    shared_experts: list[Index] | None = None
    model: str | None = None


class Audit(Known):
    moved_outside: list[str] | None = None
    footprint: dict[str, Any] | None = None
    reload_ok: bool | None = None
    untouched_identical: bool | None = None
    gate_weights_changed: float | None = None


class Parameters(Known):
    trained_parameters: Natural
    total_parameters: Annotated[int, Field(ge=1)]


def _drawn(row: dict[str, int | float | None]) -> dict[str, int | float | None]:
    """A gradient's norm may be infinite in a good run; what is drawn may not."""
    for key, value in row.items():
        if (key == "step" or key.endswith("loss")) and value is not None and not abs(value) <= FINITE:
            raise ValueError(f"{key}: found {str(value)[:40]}, expected a finite number")
    return row


class Log(RootModel[list[Annotated[dict[str, int | float | None], AfterValidator(_drawn)]]]):
    """A trainer's log_history."""

    model_config = ConfigDict(strict=True)


class OfSource(Known):
    """The rows of one source in a training stage."""

    kept: Natural
    cut: Natural
    unfinished: Natural
    dropped: dict[str, Natural]


class Rows(RootModel[dict[str, OfSource]]):
    """Source -> what became of its rows."""

    model_config = ConfigDict(strict=True)


class Edited(Known):
    """One edit of one model in an audit."""

    model: str
    kinds: list[str]
    experts: Natural
    layers: Natural
    parameters: Share
    harmful_refusal: Rate
    benign_compliance: Rate


class Robustness(RootModel[list[Edited]]):
    """What `routealign audit` measured."""

    model_config = ConfigDict(strict=True)
