"""Work dealt to processes: every item exactly once, and equally many where all must take part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.runtime import processes as run_process


@given(items=st.lists(st.integers(), max_size=40), processes=st.integers(1, 9))
def test_every_item_is_dealt_to_exactly_one_process(items: list[int], processes: int) -> None:
    shares = deal(items, processes, together=False)
    dealt = sorted(pair for share in shares for pair in share)
    assert dealt == list(enumerate(items))


@given(items=st.lists(st.integers(), max_size=40), processes=st.integers(1, 9))
def test_together_every_process_gets_equally_many_and_nothing_is_lost(items: list[int], processes: int) -> None:
    shares = deal(items, processes, together=True)
    assert len({len(share) for share in shares}) == 1
    merged = {index: item for share in shares for index, item in share}
    assert [merged[i] for i in range(len(items))] == items


def deal(items: list[int], processes: int, *, together: bool) -> list[list[tuple[int, int]]]:
    shares = []
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(processes))
            patch.setenv("RANK", str(rank))
            shares.append(run_process.dealt(items, together=together))
    return shares


def test_alone_a_process_agrees_with_itself() -> None:
    assert run_process.from_rank_0("x") == "x"
    assert run_process.from_all_ranks({1: "b", 0: "a"}) == ["a", "b"]
    assert run_process.any_rank(True) and not run_process.any_rank(False)
