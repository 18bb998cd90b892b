"""`steering.json`: a portable steering of one model, with what tells that model from any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import from_json

from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Index, Size
from trainer.moe.json_files import Record, parse
from trainer.moe.sharding import whole
from trainer.moe.steering import Steering
from trainer.moe.steering_gate import Gate

FORMAT = "routealign-steering-1"


@dataclass(frozen=True)
class SteeringFile:
    """A steering, the gate that may go with it, and the model it was made for.

    `experts_per_layer` and `top_k` are by decoder layer. `routers` is a digest of the routers' weights: an expert's
    number means nothing on another model of the same architecture. `per_layer_cap` is the most activated experts of a
    layer that the ranking admitted, None for the router's own top-k.
    """

    model: str
    revision: str | None
    model_type: str
    experts_per_layer: dict[int, int]
    top_k: dict[int, int]
    routers: str
    steering: Steering
    per_layer_cap: int | None = None
    gate: Gate | None = None
    about: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        steering: Steering,
        *,
        model: str,
        revision: str | None = None,
        per_layer_cap: int | None = None,
        gate: Gate | None = None,
        about: dict[str, object] | None = None,
    ) -> SteeringFile:
        """The file for `backbone`'s model. `ValueError` where the steering does not fit it."""
        sizes, top_k = _sizes(backbone)
        steering.check(sizes, top_k)
        kind = backbone.model.config.get_text_config().model_type
        digest = routers_digest(backbone)
        return cls(model, revision, kind, sizes, top_k, digest, steering, per_layer_cap, gate, about or {})

    def require(self, backbone: Backbone, model: str) -> None:
        """Refuse another model.

        Raises:
            ValueError: another architecture, other sizes, or other routers; says which.
        """
        kind = backbone.model.config.get_text_config().model_type
        sizes, top_k = _sizes(backbone)
        mine = f"this steering is for {self.model}"
        if kind != self.model_type:
            raise ValueError(f"{mine} of model type {self.model_type!r}; {model} is of type {kind!r}")
        if (sizes, top_k) != (self.experts_per_layer, self.top_k):
            raise ValueError(
                f"{mine} with {_described(self.experts_per_layer, self.top_k)}; {model} has {_described(sizes, top_k)}"
            )
        if routers_digest(backbone) != self.routers:
            raise ValueError(f"{mine}; the routers of {model} have other weights, so its experts mean other things")

    def to_json(self) -> str:
        """The file's text; `load` gives back an equal object."""
        steering = self.steering
        return json.dumps(
            {
                "format": FORMAT,
                "model": self.model,
                "revision": self.revision,
                "model_type": self.model_type,
                "experts_per_layer": self.experts_per_layer,
                "top_k": self.top_k,
                "routers_sha256": self.routers,
                "activate": _pairs(steering.activate),
                "deactivate": _pairs(steering.deactivate),
                "strength": steering.strength,
                "eps": steering.eps,
                "per_layer_cap": self.per_layer_cap,
                "gate": asdict(self.gate) if self.gate else None,
                "about": self.about,
            },
            indent=1,
        )

    @classmethod
    def load(cls, path: Path) -> SteeringFile:
        """Read a file written by `to_json`.

        Raises:
            ValueError: not JSON, another format, a key that is missing, of another type or out of bounds,
                contradictory sets, an expert that does not exist; the message names the file and the key.
        """
        read = parse(Path(path), _File, "a usable steering file")
        gate = read.gate
        try:
            steering = Steering(_by_layer(read.activate), _by_layer(read.deactivate), read.strength, read.eps)
            steering.check(read.experts_per_layer, read.top_k)
        except ValueError as error:
            raise ValueError(f"{path}: not a usable steering file: {error}") from error
        return cls(
            model=read.model,
            revision=read.revision,
            model_type=read.model_type,
            experts_per_layer=read.experts_per_layer,
            top_k=read.top_k,
            routers=read.routers_sha256,
            steering=steering,
            per_layer_cap=read.per_layer_cap,
            gate=Gate(gate.layer, tuple(gate.weight_D), gate.bias, gate.about) if gate else None,
            about=read.about,
        )


class _Gate(Record):
    layer: Index
    weight_D: Annotated[list[float], Field(min_length=1)]
    bias: float
    about: dict[str, Any]


class _File(Record):
    format: Literal["routealign-steering-1"]
    model: str
    revision: str | None
    model_type: str
    experts_per_layer: dict[Index, Size]
    top_k: dict[Index, Size]
    routers_sha256: str
    activate: list[tuple[Index, Index]]
    deactivate: list[tuple[Index, Index]]
    strength: Annotated[float, Field(ge=0, le=1)]
    eps: Annotated[float, Field(gt=0, le=1e6)]
    per_layer_cap: Size | None
    gate: _Gate | None
    about: dict[str, Any]

    @model_validator(mode="after")
    def _same_layers(self) -> _File:
        if self.top_k.keys() != self.experts_per_layer.keys():
            raise ValueError("top_k and experts_per_layer are of different layers")
        return self


def read(path: Path, backbone: Backbone, model: str) -> SteeringFile:
    """A steering for this model from `steering.json`, or from an expert set, whose experts are then deactivated.

    Raises:
        ValueError: neither kind of file, or one of another model; the message names the file.
    """
    try:
        data = from_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); expected steering.json or expert_set.json"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not (isinstance(data, dict) and "members" in data):
        loaded = SteeringFile.load(path)
    else:
        experts = ExpertSet.load(path)
        sizes, _ = _sizes(backbone)
        if experts.experts_per_layer != sizes:
            raise ValueError(f"{path}: an expert set of another model: its experts by layer differ from {model}'s")
        off = {layer: tuple(members) for layer, members in experts.by_layer().items()}
        try:
            loaded = SteeringFile.of(backbone, Steering(deactivate=off), model=model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not loaded.steering.layers:
        raise ValueError(f"{path}: names no expert; expected at least one to activate or deactivate")
    try:
        loaded.require(backbone, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return loaded


def routers_digest(backbone: Backbone) -> str:
    """Hex sha256 of all router weights rounded to bf16, so that a checkpoint has one digest in any precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.router_parameters().items()):
        digest.update(name.encode())
        digest.update(whole(parameter).to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sizes(backbone: Backbone) -> tuple[dict[int, int], dict[int, int]]:
    return {layer.index: layer.num_experts for layer in backbone}, {layer.index: layer.top_k for layer in backbone}


def _described(experts: Mapping[int, int], top_k: Mapping[int, int]) -> str:
    each, k = "/".join(map(str, sorted(set(experts.values())))), "/".join(map(str, sorted(set(top_k.values()))))
    return f"{len(experts)} MoE layers of {each} experts, top {k}"


def _pairs(experts: Mapping[int, tuple[int, ...]]) -> list[list[int]]:
    return [[layer, expert] for layer in sorted(experts) for expert in experts[layer]]


def _by_layer(pairs: list[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, tuple[int, ...]] = {}
    for layer, expert in pairs:
        layers[layer] = (*layers.get(layer, ()), expert)
    return layers
