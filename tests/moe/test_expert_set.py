"""Expert sets: algebra, matched random control, the file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.moe.expert_set import ExpertSet, Member

SIZES = {1: 6, 2: 6, 5: 8}
pairs = st.sets(st.sampled_from([(layer, e) for layer, n in SIZES.items() for e in range(n)]), max_size=12)


def build(chosen: set[tuple[int, int]]) -> ExpertSet:
    return ExpertSet(
        tuple(Member(layer, e, 0.5, 0.9) for layer, e in sorted(chosen)), SIZES, "some/model", {"pairs": 3}
    )


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


@given(pairs)
def test_the_file_round_trips(chosen: set[tuple[int, int]]) -> None:
    path = Path("/dev/shm") if Path("/dev/shm").exists() else Path(".")
    file = path / "routealign-expert-set-test.json"
    file.write_text(build(chosen).to_json())
    assert ExpertSet.load(file) == build(chosen)
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


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 99}'])
def test_a_file_that_is_no_expert_set_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"set\.json: not an expert set"):
        ExpertSet.load(file)
