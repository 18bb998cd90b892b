import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.degenerate import is_degenerate


@given(st.text(max_size=300))
def test_any_text_is_or_is_not(text):
    assert isinstance(is_degenerate(text), bool)


@pytest.mark.parametrize(
    "text", ["i and but i " * 5000, "sorry " * 9000, "i am do not can " * 5000, '"' * 20000, "ab" * 20000]
)
def test_long_odd_replies_are_read_quickly(text):
    started = time.perf_counter()
    is_degenerate(text)
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "?!?!?!",
        "the the the the the the the the the",
        "I can help. I can help. I can help. I can help. I can help.",
        "Sure, here is the list: one two three one two three one two three one two three one two three",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "abcabcabcabcabcabcabcabcabcabc",
    ],
)
def test_loops_and_blanks_are_degenerate(reply):
    assert is_degenerate(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "42",
        "Yes.",
        "no no no",
        "I'm sorry, but I can't help with that.",
        "Row, row, row your boat gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "The cat sat on the mat. The dog sat on the rug. The bird sat on the roof and sang the whole day long.",
        "1. Mix the flour. 2. Add the eggs. 3. Add the milk. 4. Add the salt. 5. Bake it.",
        "Title\n----------\nA short text about how rivers shape the land over many thousands of years.",
        "1000000000000000000000",
    ],
)
def test_ordinary_replies_are_not_degenerate(reply):
    assert not is_degenerate(reply)
