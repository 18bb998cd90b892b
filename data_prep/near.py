"""Goals that are nearly the same: by their content words, or one inside the other.

Two texts are near where the Jaccard index of their content words is large, and where the words of one stand in the
other in the same order without gaps (a goal inside a jailbreak). Case, spaces and punctuation make no difference.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from .same_text import normalised

FEWEST = 3
"""Content words that a goal has at least for a text that holds it to be near: "stop it" stands in many texts."""

# They say nothing of what is asked.
_GRAMMAR_WORDS = """
a about all also am an and any are as at be been but by can could did do does for from get give had has have he her him
his how i if in into is it its let like make may me more most my need no not of on one or other our out own please s
she should so some such t than that the their them then there these they this those to too up us very want was we were
what when where which who whom why will with would you your
"""
_GRAMMAR = frozenset(_GRAMMAR_WORDS.split())
# Scripts written without spaces between words: pairs of neighbours stand for words.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]+")


def words(text: str) -> list[str]:
    """The words of a text in order, without case and punctuation."""
    found: list[str] = []
    for word in normalised(text).split():
        if _UNSPACED.fullmatch(word) and len(word) > 2:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            found.append(word)
    return found


def content_words(text: str) -> frozenset[str]:
    """The words that say what is asked; all of them where a text has no others."""
    found = frozenset(words(text))
    return found - _GRAMMAR or found


class Goals:
    """Texts to be kept apart from others.

    What is compared grows with the texts that share a word, not with their number: of each goal only its rarest words
    are looked up, one of which every near text has.
    """

    def __init__(self, texts: Iterable[str], near: float) -> None:
        self._near = near
        self._content: list[frozenset[str]] = []
        self._ordered: list[tuple[str, ...]] = []
        for text in texts:
            self._ordered.append(tuple(words(text)))
            self._content.append(content_words(text))
        often = Counter(word for content in self._content for word in content)
        self._by_word: defaultdict[str, set[int]] = defaultdict(set)
        self._by_place: defaultdict[tuple[str, ...], set[tuple[int, int]]] = defaultdict(set)
        for i, content in enumerate(self._content):
            rarest = sorted(content, key=lambda word: (often[word], word))
            for word in rarest[: len(content) - math.ceil(near * len(content)) + 1]:
                self._by_word[word].add(i)
            for at, few in _runs(self._ordered[i]):
                self._by_place[few].add((i, at))

    def is_near(self, text: str) -> bool:
        """Whether the text is nearly a goal, holds a goal, or is a part of one."""
        content = content_words(text)
        candidates = {i for word in content for i in self._by_word.get(word, ())}
        if any(self._jaccard(i, content) >= self._near for i in candidates):
            return True
        ordered = tuple(words(text))
        for at, few in _runs(ordered):
            for i, place in self._by_place.get(few, ()):
                # A goal that begins here, or a text that began there.
                if place == 0 and len(self._content[i]) >= FEWEST and _begins(ordered, at, self._ordered[i]):
                    return True
                if at == 0 and len(content) >= FEWEST and _begins(self._ordered[i], place, ordered):
                    return True
        return False

    def _jaccard(self, i: int, content: frozenset[str]) -> float:
        both = len(content & self._content[i])
        return both / (len(content) + len(self._content[i]) - both)


def _runs(ordered: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(place, as many words as the shortest text that can be held has)."""
    for at in range(len(ordered) - FEWEST + 1):
        yield at, ordered[at : at + FEWEST]


def _begins(whole: tuple[str, ...], at: int, part: tuple[str, ...]) -> bool:
    return whole[at : at + len(part)] == part
