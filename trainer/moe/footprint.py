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

    def experts(self, backbone: Backbone) -> dict[int, int]:
        """Layer index -> how many of its routed experts may change; layers without any are left out."""
        found = {}
        for layer in backbone:
            names = [f"{layer.experts_name}.{name}" for name in expert_tensor_names(layer.experts)]
            rows = [self.rows[name] for name in names if name in self.rows]
            chosen: frozenset[int] = frozenset().union(*(some for some in rows if some is not None))
            number = layer.num_experts if None in rows else len(chosen)
            if number:
                found[layer.index] = number
        return found

    def parameters(self, backbone: Backbone) -> int:
        """How many of a stock model's parameters it holds; packed or split over processes, they count whole.

        Tied ones count once, under whichever name it has them.
        """
        fused = backbone.expert_parameters()  # where these are packed, the model has them under another name
        num_experts = {
            f"{layer.experts_name}.{name}": layer.num_experts
            for layer in backbone
            for name in expert_tensor_names(layer.experts)
        }
        held: dict[nn.Parameter, frozenset[int] | None] = {}
        count_of: dict[nn.Parameter, int] = {}
        for name, parameter in {**dict(backbone.model.named_parameters(remove_duplicate=False)), **fused}.items():
            if name in self.rows:
                held[parameter] = _either(held.get(parameter, frozenset()), self.rows[name])
                count_of[parameter] = num_experts.get(name) or len(parameter)
        return sum(
            size(parameter) if rows is None else size(parameter) // count_of[parameter] * len(rows)
            for parameter, rows in held.items()
        )


def _either(some: frozenset[int] | None, others: frozenset[int] | None) -> frozenset[int] | None:
    return None if some is None or others is None else some | others
