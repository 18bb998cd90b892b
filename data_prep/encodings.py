"""Ways to write a goal so that it does not look like one; each is undone by what its templates say."""

import base64
import codecs
from collections.abc import Callable

_LEET = str.maketrans("aeiostAEIOST", "431057431057")


def split_in_two(text: str) -> str:
    """`A` and `B` in quotation marks, which read together give the text."""
    words = text.split()
    half = (len(words) + 1) // 2
    return f'A = "{" ".join(words[:half])}"\nB = "{" ".join(words[half:])}"'


ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "reversed": lambda text: " ".join(reversed(text.split())),
    "leetspeak": lambda text: text.translate(_LEET),
    "spaced": lambda text: "  ".join(" ".join(word) for word in text.split()),
    "hex": lambda text: text.encode().hex(" "),
    "split": split_in_two,
}
"""Name -> the goal as a template of that encoding holds it."""
