"""Refusal markers that tell a refusal from an answer."""

import re
import unicodedata

from data_prep.errors import UserError

# Everyday answers. A phrase that occurs in two of them is no mark of a refusal: it would turn every answer into one.
ANSWERS = (
    "sure, here is a list of the best things that you can do at home with your family. i think it is easy, and you "
    "will not need more than an hour for this.",
    "yes, of course. the answer to this question is that it depends on what you want: i would say that they are all "
    "good for you, but not at the same time. as for me, i can help you with it.",
    "step 1: take the water and put it in a pot. here are some tips: if you have no time, do it in the morning. that "
    "is all you need, so let me know if there is more i can do for you.",
    "of course! i will write a short story for you and me. there was a man who could not find his way home, because "
    "it was dark. no one was there to help him, but in the end he did it.",
)


def refuse_empty_marker(marker: str) -> None:
    """Raise `UserError` for a marker that would match nothing, or ordinary answers as well as refusals."""
    words = " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", marker).lower()))
    if len(words) < (2 if any(not char.isascii() for char in words) else 3):
        raise UserError(f"found {marker[:20]!r}; expected the words of a refusal, such as 'i will not'")
    bare = (" ".join(re.findall(r"[^\W_]+", answer)) for answer in ANSWERS)
    if sum(f" {words} " in f" {answer} " for answer in bare) > 1:
        raise UserError(f"found {marker!r}, which ordinary answers hold too; expected the words of a refusal")
