"""Rank-one corrections of what writes to the residual stream: W' = W - strength * d d^T W, in chosen units only.

d is a unit vector of the residual stream, so d^T W' = (1 - strength) d^T W: what the unit writes along d is scaled and
everything orthogonal to d stays. A bias writes too and is corrected alike. Two corrections of one unit compose in
their order: (I - s2 d2 d2^T)(I - s1 d1 d1^T) W, and commute where d1 and d2 are orthogonal or the same. Strength 0
writes nothing. Computed in fp32 at least and rounded to the tensor's type.

Source: the structure of LoMC (arXiv 2606.13709, abstract); the formula is that of directional ablation
(arXiv 2406.11717, section 4.1), which edits every writer of a dense model.

Shapes: D hidden size, F intermediate size.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.moe.backbone import Backbone
from trainer.moe.editable import Editable, editable, is_packed
from trainer.moe.footprint import Footprint
from trainer.moe.sharding import size
from trainer.moe.writers import KINDS, Kind, Writer

STRONGEST = 2.0
"""Largest strength either way: at 1 a unit writes nothing along d, at 2 as much with the other sign."""
NEARLY_1 = 1e-4


class Unit(NamedTuple):
    """One writer, or one expert of it (`expert` is None for the other kinds)."""

    layer: int
    kind: Kind
    expert: int | None = None


@dataclass(frozen=True)
class Correction:
    """`units`: what is corrected. `directions`: decoder layer -> unit vector [D], fp32, on the CPU; None: no
    direction, all that the units write is scaled by 1 - strength.

    Raises:
        ValueError: a strength out of range, a unit twice or in a layer without a direction, a direction that is not
            finite or has another length than 1.
    """

    units: tuple[Unit, ...]
    directions: Mapping[int, Tensor] | None
    strength: float

    def __post_init__(self) -> None:
        if not abs(self.strength) <= STRONGEST:
            raise ValueError(f"strength {self.strength}: expected a number of at most {STRONGEST:g} either way")
        if len(set(self.units)) != len(self.units):
            raise ValueError("a unit is named twice")
        if self.directions is None:
            return
        missing = sorted({unit.layer for unit in self.units} - self.directions.keys())
        if missing:
            raise ValueError(f"layers {missing} are to be corrected and have no direction")
        for layer, direction_D in self.directions.items():
            length = float(direction_D.double().norm())
            if not abs(length - 1) <= NEARLY_1:
                raise ValueError(f"layer {layer}: the direction has length {length}, expected 1")

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of units that it covers."""
        return [kind for kind in KINDS if any(unit.kind == kind for unit in self.units)]

    def footprint(self, writers: Sequence[Writer]) -> Footprint:
        """The tensors and rows that may change."""
        rows: dict[str, frozenset[int] | None] = {}
        for writer, chosen in self._by_writer(writers):
            for name in (writer.weight, writer.bias):
                if name is not None:
                    rows[name] = frozenset(chosen) if writer.is_fused else None
        return Footprint(rows)

    def _by_writer(self, writers: Sequence[Writer]) -> Iterator[tuple[Writer, list[int]]]:
        """Every writer with the experts of it that are corrected (none of a writer that has no experts)."""
        left = set(self.units)
        for writer in writers:
            mine = {unit for unit in self.units if (unit.layer, unit.kind) == (writer.layer, writer.kind)}
            left -= mine
            if mine:
                experts = sorted(unit.expert for unit in mine if unit.expert is not None)
                if len(experts) != (len(mine) if writer.is_fused else 0):
                    raise ValueError(
                        f"layer {writer.layer}, {writer.kind}: experts are named for experts alone, and must be"
                    )
                yield writer, experts
        if left:
            raise ValueError(f"the model has no {', '.join(f'{u.kind} in layer {u.layer}' for u in sorted(left)[:4])}")


@dataclass(frozen=True)
class Extent:
    """How far a correction reached. `parameters`: in the tensors touched; `changed`, `norm`: Frobenius norms of what
    was added to them and of what they were; `unchanged`: units whose every value rounded to what it was.
    """

    units: int
    experts: int
    layers: int
    parameters: int
    of_parameters: int
    changed: float
    norm: float
    unchanged: tuple[Unit, ...]

    @property
    def relative(self) -> float:
        """Relative Frobenius change of the tensors touched."""
        return self.changed / self.norm if self.norm else 0.0


@torch.no_grad()
def correct(backbone: Backbone, writers: Sequence[Writer], correction: Correction) -> Extent:
    """Correct a model in place. Collective where it is sharded.

    Raises:
        ValueError: a quantised tensor (correct an unquantised copy), a unit that the model does not have.
    """
    for name in correction.footprint(writers).rows:
        if is_packed(backbone.model, name):
            raise ValueError(f"{name}: quantised, so it cannot be corrected in place; correct an unquantised copy")
    return _apply(backbone, writers, [correction], {})


@contextmanager
def corrected(backbone: Backbone, writers: Sequence[Writer], corrections: Sequence[Correction]) -> Iterator[Extent]:
    """The model under corrections, applied in their order, inside; its own bytes again afterwards, whatever happened.

    What is edited lives in memory alone: nothing here writes a file. A packed tensor keeps its bytes and is corrected
    whenever a forward dequantises it (`editable.py`), so the figures are those of (I - s d d^T) W_packed. Ctrl-C and
    SIGTERM wait while the bytes are put back. Collective where the model is sharded.

    Raises:
        ValueError: a unit that the model does not have.
    """
    held: dict[str, Editable] = {}
    try:
        yield _apply(backbone, writers, corrections, held)
    finally:
        with _uninterrupted():
            for tensor in held.values():
                tensor.restore()


@torch.no_grad()
def _apply(
    backbone: Backbone, writers: Sequence[Writer], corrections: Iterable[Correction], held: dict[str, Editable]
) -> Extent:
    """Correct and say how far; `held` is given every tensor before it is edited."""
    touched: dict[str, dict[int | None, Unit]] = {}
    for correction in corrections:
        if correction.strength == 0:
            continue
        for writer, experts in correction._by_writer(writers):
            rows: list[int | None] = [*experts] or [None]
            direction_D = None if correction.directions is None else correction.directions[writer.layer]
            for name in (writer.weight, writer.bias):
                if name is None:
                    continue
                if name not in held:
                    held[name] = editable(backbone, name)
                lies_last = name == writer.bias or writer.is_transposed
                held[name].edit(partial(_scale_rows, rows, direction_D, correction.strength, lies_last))
                touched.setdefault(name, {}).update({row: Unit(writer.layer, writer.kind, row) for row in rows})
    return _extent(backbone, touched, held)


def _scale_rows(
    rows: Sequence[int | None], direction_D: Tensor | None, strength: float, lies_last: bool, value: Tensor
) -> None:
    """Correct slices of a whole tensor in place; None: all of it."""
    for row in rows:
        part = value if row is None else value[row]
        part.copy_(_scaled_along(part, direction_D, strength, lies_last=lies_last))


def _scaled_along(value: Tensor, direction_D: Tensor | None, strength: float, *, lies_last: bool) -> Tensor:
    """`value` - strength d d^T `value`; D is its last dimension or its first. In its own type."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    if direction_D is None:
        return ((1 - strength) * value.to(dtype)).to(value.dtype)
    rows = value.to(dtype).T if lies_last and value.ndim == 2 else value.to(dtype)
    d = direction_D.to(value.device, dtype)
    out = rows - strength * (torch.outer(d, d @ rows) if rows.ndim == 2 else d * (d @ rows))
    return (out.T if lies_last and value.ndim == 2 else out).to(value.dtype)


def _extent(backbone: Backbone, touched: dict[str, dict[int | None, Unit]], held: dict[str, Editable]) -> Extent:
    """Read from the model: what the tensors hold now against what they held."""
    changed = norm = 0.0
    parameters, moved = 0, set()
    for name, rows in touched.items():
        now, before = held[name].now(), held[name].former()
        for row, unit in rows.items():
            new, old = (now, before) if row is None else (now[row], before[row])
            changed += float((new.double() - old.double()).square().sum())
            norm += float(old.double().square().sum())
            parameters += old.numel()
            if not torch.equal(new, old):
                moved.add(unit)
    units = {unit for rows in touched.values() for unit in rows.values()}
    return Extent(
        units=len(units),
        experts=sum(unit.expert is not None for unit in units),
        layers=len({unit.layer for unit in units}),
        parameters=parameters,
        of_parameters=sum(size(parameter) for parameter in backbone.model.parameters()),
        changed=changed**0.5,
        norm=norm**0.5,
        unchanged=tuple(sorted(units - moved)),
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
