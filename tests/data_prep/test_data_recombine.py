"""Recombined wrappers are made of what was given, keep the goal's place, and repeat by seed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.recombine import recombine
from data_prep.schema import Conversation, Wrapper

MARK = "[INSERT PROMPT HERE]"
WORDS = st.text(alphabet="abc XY.!?:\n\"'", min_size=0, max_size=60)
TEMPLATES = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)


def wrappers(parts: list[tuple[str, str]], mark: str = MARK) -> list[Wrapper]:
    return [Wrapper(f"t:{i}", "t", "seen", before + mark + after, mark) for i, (before, after) in enumerate(parts)]


@settings(max_examples=60, deadline=None)
@given(TEMPLATES, st.lists(WORDS, max_size=3), st.integers(0, 20), st.integers(0, 2**31))
def test_recombined(parts: list[tuple[str, str]], contexts: list[str], n: int, seed: int) -> None:
    given_wrappers = wrappers(parts)
    made = recombine(given_wrappers, contexts, n, seed)
    assert made == recombine(given_wrappers, contexts, n, seed)
    assert len(made) == n and len({w.id for w in made}) == n
    # Quotes around the goal go with it, so they are left out of the comparison.
    quotes = str.maketrans("", "", "\"'")
    material = " ".join([*(before + " " + after for before, after in parts), *contexts]).translate(quotes).split()
    for wrapper in made:
        assert (wrapper.family, wrapper.role) == ("recombined", "seen")
        assert wrapper.text.count(MARK) == 1
        assert wrapper.wrap(Conversation.of("GOAL")).text.count("GOAL") == 1
        assert set(wrapper.text.replace(MARK, " ").translate(quotes).split()) <= set(material)


def test_they_vary() -> None:
    source = wrappers([("One two. Three four. ", " Five six. Seven."), ("Alpha. Beta. ", " Gamma. Delta.")])
    made = {w.text for w in recombine(source, ["What a day."], 60, 0)}
    assert len(made) > 30
    assert any(text.startswith(MARK) for text in made) and any(text.endswith(MARK) for text in made)
    assert any("What a day." in text for text in made)


def test_a_context_with_the_placeholder_is_left_out() -> None:
    made = recombine(wrappers([("a. ", "")]), [f"trap {MARK}"], 30, 0)
    assert all(w.text.count(MARK) == 1 for w in made)


def test_refusals() -> None:
    with pytest.raises(UserError, match="at least one"):
        recombine([], [], 3, 0)
    with pytest.raises(UserError, match="share one placeholder"):
        recombine(wrappers([("a", "")]) + wrappers([("b", "")], "{goal}"), [], 3, 0)


def test_wrapper_fills_every_placeholder_and_needs_one() -> None:
    assert Wrapper("a", "a", "seen", "X and X", "X").wrap(Conversation.of("goal")).text == "goal and goal"
    with pytest.raises(UserError, match="template t:3 has no placeholder"):
        Wrapper("t:3", "t", "seen", "nothing", MARK)
