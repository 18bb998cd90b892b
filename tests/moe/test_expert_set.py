"""Expert sets: algebra, matched random control, the file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.moe.expert_set import ExpertSet, Member

SIZES = {1: 6, 2: 6, 5: 8}
pairs = st.sets(st.sampled_from([(layer, e) for layer, n in SIZES.items() for e in range(n)]), max_size=12)


layers = st.sets(st.sampled_from(sorted(SIZES)))


def build(chosen: set[tuple[int, int]], shared: set[int] | None = None) -> ExpertSet:
    members = tuple(Member(layer, e, 0.5, 0.9) for layer, e in sorted(chosen))
    return ExpertSet(members, SIZES, "some/model", {"pairs": 3}, tuple(sorted(shared or ())))


@given(layers, layers)
def test_algebra_is_set_algebra_on_shared_experts_too(a: set[int], b: set[int]) -> None:
    one, other = build({(1, 0)}, a), build({(1, 1)}, b)
    assert (set((one & other).shared), set((one | other).shared), set((one - other).shared)) == (a & b, a | b, a - b)
    assert set(one.random_like(0).shared) == a


@given(pairs, layers)
def test_shared_experts_are_taken_where_the_set_has_members(chosen: set[tuple[int, int]], having: set[int]) -> None:
    wanted = {layer for layer, _ in chosen} & having
    if wanted:
        assert set(build(chosen).with_shared(having).shared) == wanted
    else:
        with pytest.raises(ValueError, match="no shared expert"):
            build(chosen).with_shared(having)


@given(pairs, pairs)
def test_algebra_is_set_algebra_on_layer_and_expert(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    assert (build(a) & build(b)).pairs == a & b
    assert (build(a) | build(b)).pairs == a | b
    assert (build(a) - build(b)).pairs == a - b
    assert build(a).jaccard(build(b)) == (len(a & b) / len(a | b) if a | b else 1.0)


@given(pairs, st.integers(0, 5))
def test_the_random_control_matches_every_layer_and_avoids_the_set_where_it_can(
    chosen: set[tuple[int, int]], seed: int
) -> None:
    found, control = build(chosen), build(chosen).random_like(seed)
    assert {k: len(v) for k, v in control.by_layer().items()} == {k: len(v) for k, v in found.by_layer().items()}
    for layer, experts in found.by_layer().items():
        overlap = set(experts) & set(control.by_layer()[layer])
        assert len(overlap) == max(0, 2 * len(experts) - SIZES[layer])
    assert control.pairs == build(chosen).random_like(seed).pairs


@given(pairs, layers)
def test_the_file_round_trips(chosen: set[tuple[int, int]], shared: set[int]) -> None:
    path = Path("/dev/shm") if Path("/dev/shm").exists() else Path(".")
    file = path / "routealign-expert-set-test.json"
    file.write_text(build(chosen, shared).to_json())
    assert ExpertSet.load(file) == build(chosen, shared)
    file.unlink()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((Member(3, 0),), "layer 3 has no experts"),
        ((Member(1, 6),), "expert 6 of layer 1 does not exist"),
        ((Member(1, 2), Member(1, 2)), "named twice"),
    ],
)
def test_members_outside_the_model_are_refused(members: tuple[Member, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertSet(members, SIZES)


@pytest.mark.parametrize("shared", [(3,), (1, 1)])
def test_shared_experts_of_other_layers_are_refused(shared: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shared experts of layers"):
        ExpertSet((Member(1, 0),), SIZES, shared=shared)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 99}'])
def test_a_file_that_is_no_expert_set_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"set\.json: not an expert set"):
        ExpertSet.load(file)
