"""A set of (layer, expert) with scores: what detection finds, repair trains and the audit checks. Knows no model."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.moe.json_files import Record, parse

VERSION = 1
Index = Annotated[int, Field(ge=0, lt=65536)]
"""Of a decoder layer, or of an expert in it."""
Size = Annotated[int, Field(ge=1, le=65536)]
"""Experts of a layer."""


@dataclass(frozen=True, order=True)
class Member:
    """One expert: decoder-layer index, expert index, its score and the share of bootstrap resamples that select it."""

    layer: int
    expert: int
    score: float = 0.0
    stability: float | None = None


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one model. `experts_per_layer` maps every MoE layer's index to its number of routed experts.

    `shared`: layers whose shared expert, which every token passes, belongs to the set too. Members, sizes and overlaps
    are those of routed experts.

    Raises:
        ValueError: a member outside the model, or named twice.
    """

    members: tuple[Member, ...]
    experts_per_layer: dict[int, int]
    model: str = ""
    about: dict[str, object] = field(default_factory=dict)
    shared: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for member in self.members:
            experts = self.experts_per_layer.get(member.layer)
            if experts is None:
                raise ValueError(f"layer {member.layer} has no experts; MoE layers: {sorted(self.experts_per_layer)}")
            if not 0 <= member.expert < experts:
                raise ValueError(f"expert {member.expert} of layer {member.layer} does not exist: 0..{experts - 1}")
        if len(self.pairs) != len(self.members):
            raise ValueError("an expert is named twice")
        if len(set(self.shared)) != len(self.shared) or not set(self.shared) <= self.experts_per_layer.keys():
            known = sorted(self.experts_per_layer)
            raise ValueError(f"shared experts of layers {list(self.shared)}; MoE layers, each once: {known}")

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @property
    def pairs(self) -> frozenset[tuple[int, int]]:
        return frozenset((m.layer, m.expert) for m in self.members)

    @property
    def total(self) -> int:
        """Number of routed experts in the model."""
        return sum(self.experts_per_layer.values())

    @property
    def share(self) -> float:
        """Share of the model's routed experts in this set."""
        return len(self) / self.total

    def by_layer(self) -> dict[int, list[int]]:
        """Layer index -> ascending expert indices, only layers with members."""
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(self.pairs):
            layers.setdefault(layer, []).append(expert)
        return layers

    def with_shared(self, layers: Collection[int]) -> ExpertSet:
        """The set with the shared experts of those `layers` that have members.

        Raises:
            ValueError: none of them has.
        """
        shared = tuple(layer for layer in self.by_layer() if layer in layers)
        if not shared:
            raise ValueError(f"no shared expert beside those of layers {list(self.by_layer())}")
        return replace(self, shared=shared)

    def _with(self, pairs: frozenset[tuple[int, int]], shared: set[int], other: ExpertSet) -> ExpertSet:
        known = {(m.layer, m.expert): m for source in (other, self) for m in source.members}
        return replace(self, members=tuple(known[p] for p in sorted(pairs)), shared=tuple(sorted(shared)))

    def __and__(self, other: ExpertSet) -> ExpertSet:
        return self._with(self.pairs & other.pairs, set(self.shared) & set(other.shared), other)

    def __or__(self, other: ExpertSet) -> ExpertSet:
        return self._with(self.pairs | other.pairs, set(self.shared) | set(other.shared), other)

    def __sub__(self, other: ExpertSet) -> ExpertSet:
        return self._with(self.pairs - other.pairs, set(self.shared) - set(other.shared), other)

    def jaccard(self, other: ExpertSet) -> float:
        """Overlap |A & B| / |A | B|; 1.0 for two empty sets."""
        union = self.pairs | other.pairs
        return len(self.pairs & other.pairs) / len(union) if union else 1.0

    def random_like(self, seed: int) -> ExpertSet:
        """A control set with as many experts in every layer, drawn from its *other* experts where they suffice.

        Of shared experts there are no others: the control has the same ones.
        """
        generator = random.Random(seed)
        members = []
        for layer, experts in self.by_layer().items():
            others = [e for e in range(self.experts_per_layer[layer]) if e not in set(experts)]
            drawn = generator.sample(others, min(len(experts), len(others)))
            drawn += generator.sample(experts, len(experts) - len(drawn))
            members += [Member(layer, expert) for expert in sorted(drawn)]
        return replace(self, members=tuple(members), about={**self.about, "control": "random", "seed": seed})

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": VERSION,
                "model": self.model,
                "num_layers": len(self.experts_per_layer),
                "experts_per_layer": {str(k): v for k, v in sorted(self.experts_per_layer.items())},
                "share": round(self.share, 6),
                "about": self.about,
                "shared_experts": list(self.shared),
                "members": [
                    {"layer": m.layer, "expert": m.expert, "score": m.score, "stability": m.stability}
                    for m in self.members
                ],
            },
            indent=1,
        )

    @classmethod
    def load(cls, path: Path) -> ExpertSet:
        """Read a set written by `to_json`.

        Raises:
            ValueError: not JSON, another version, a key that is missing, of another type or out of bounds, or an
                expert that does not exist; the message names the file and the key.
        """
        read = parse(Path(path), _File, "an expert set")
        try:
            return cls(
                members=tuple(Member(m.layer, m.expert, m.score, m.stability) for m in read.members),
                experts_per_layer=read.experts_per_layer,
                model=read.model,
                about=read.about,
                shared=tuple(read.shared_experts),
            )
        except ValueError as error:
            raise ValueError(f"{path}: not an expert set: {error}") from error


class _Member(Record):
    layer: Index
    expert: Index
    score: float
    stability: Annotated[float, Field(ge=0, le=1)] | None


class _File(Record):
    version: Literal[1]
    model: str
    experts_per_layer: dict[Index, Size]
    about: dict[str, Any]
    shared_experts: list[Index] = []  # older sets have none
    members: list[_Member]
