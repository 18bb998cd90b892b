"""What an edit may change: tensors of a model by name, whole or some rows of them.

A stage declares its footprint before it acts; the audit proves that nothing outside it moved, the patch keeps it and
the planner counts it. A row is an index of a tensor's first dimension: of fused experts, an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from trainer.moe.backbone import Backbone, expert_tensor_names
from trainer.moe.expert_set import ExpertSet
from trainer.moe.sharding import size


@dataclass(frozen=True)
class Footprint:
    """`rows`: name of a parameter or buffer in the model -> rows that may change, None for all of them."""

    rows: Mapping[str, frozenset[int] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> Footprint:
        """Whole tensors: attention outputs, adapters, whatever has a name."""
        return cls(dict.fromkeys(names))

    @classmethod
    def of_experts(cls, backbone: Backbone, experts: ExpertSet) -> Footprint:
        """The rows of a set's routed experts, and its shared experts whole."""
        rows: dict[str, frozenset[int] | None] = {}
        for index, chosen in experts.by_layer().items():
            layer = backbone.layer(index)
            for name in expert_tensor_names(layer.experts):
                rows[f"{layer.experts_name}.{name}"] = frozenset(chosen)
        for index in experts.shared:
            rows |= dict.fromkeys(backbone.layer(index).shared_parameters())
        return cls(rows)

    @classmethod
    def of_routers(cls, backbone: Backbone) -> Footprint:
        """Every router's parameters."""
        return cls.of(backbone.router_parameters())

    @classmethod
    def everything(cls, model: nn.Module) -> Footprint:
        """Every parameter of a stock model."""
        return cls.of(name for name, _ in model.named_parameters(remove_duplicate=False))

    def __or__(self, other: Footprint) -> Footprint:
        rows = dict(self.rows)
        for name, more in other.rows.items():
            rows[name] = _either(rows.get(name, frozenset()), more)
        return Footprint(rows)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def covers(self, name: str, rows: Iterable[int]) -> bool:
        """Whether these rows of a tensor may change."""
        allowed = self.rows.get(name, frozenset())
        return allowed is None or allowed.issuperset(rows)

    def parameters(self, model: nn.Module) -> int:
        """How many of a stock model's parameters it holds; tied ones count once, under whichever name it has them."""
        held: dict[nn.Parameter, frozenset[int] | None] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.rows:
                held[parameter] = _either(held.get(parameter, frozenset()), self.rows[name])
        return sum(
            size(parameter) if rows is None else size(parameter) // parameter.shape[0] * len(rows)
            for parameter, rows in held.items()
        )


def _either(some: frozenset[int] | None, others: frozenset[int] | None) -> frozenset[int] | None:
    return None if some is None or others is None else some | others
