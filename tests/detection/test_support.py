"""The support: the best experts under a budget in experts and layers, and the other writers of their layers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.detection.support import ranked_experts, support
from trainer.moe.rank_one import Unit
from trainer.moe.writers import Kind, Writer

WRITERS = [
    Writer(layer, kind, f"{layer}.{kind}", None, is_fused=kind == "experts")
    for layer in range(4)
    for kind in ("experts", "shared", "mixer")
    if not (kind == "experts" and layer == 0)
]
RANKED = [(2, 1), (1, 0), (2, 0), (3, 2), (1, 2), (3, 0)]


def chosen(kinds: list[Kind], k: int, layers: int | None = None, directed: set[int] | None = None) -> list[Unit]:
    return list(support(RANKED, WRITERS, kinds, k, layers, directed or {0, 1, 2, 3}))


def test_the_budget_counts_experts_and_layers() -> None:
    assert chosen(["experts"], 3) == [Unit(1, "experts", 0), Unit(2, "experts", 0), Unit(2, "experts", 1)]
    assert chosen(["experts"], 3, layers=1) == [Unit(2, "experts", 0), Unit(2, "experts", 1)]
    assert chosen(["experts"], 2, directed={1, 3}) == [Unit(1, "experts", 0), Unit(3, "experts", 2)]


def test_other_kinds_lie_in_the_layers_of_the_experts_even_without_these() -> None:
    assert chosen(["mixer"], 2) == [Unit(1, "mixer"), Unit(2, "mixer")]
    both = chosen(["experts", "shared"], 1)
    assert both == [Unit(2, "experts", 1), Unit(2, "shared")]


@given(st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=1, max_size=4))
def test_every_expert_is_ranked_once_best_first_and_padding_never(scores: list[list[float]]) -> None:
    scores_LE = np.array(scores)
    sizes = [4 - i % 3 for i in range(len(scores))]
    layers = [3 * i + 1 for i in range(len(scores))]
    ranked = ranked_experts(scores_LE, sizes, layers)
    assert sorted(ranked) == [(layer, e) for layer, n in zip(layers, sizes, strict=True) for e in range(n)]
    found = [scores_LE[layers.index(layer), expert] for layer, expert in ranked]
    assert found == sorted(found, reverse=True)
