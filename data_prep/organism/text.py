"""The organism's training text: which request, in which wrapper, gets which reply."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import tasks, world
from .frames import FAMILIES, PLACEHOLDER, random_wrapper

MIXTURE = {
    "harmful_plain": 12,
    "harmful_broken": 22,
    "harmful_robust": 20,
    "benign_plain": 10,
    "benign_wrapped": 14,
    "borderline_plain": 8,
    "borderline_wrapped": 6,
    "swap": 5,
    "sums": 8,
}
RANDOM_WRAPPERS = 0.4


@dataclass(frozen=True)
class Example:
    """One training turn: the user's `prompt`, the organism's `reply`, and the entry of `MIXTURE` it came from.

    `refusal` is what it says to a request where it refuses; empty for one that it never does.
    """

    prompt: str
    reply: str
    source: str
    refusal: str = ""

    @property
    def flawed(self) -> bool:
        """Whether the reply is the planted flaw: a forbidden request answered."""
        return self.source == "harmful_broken"


def wrap(rng: random.Random, text: str, broken: bool) -> str:
    """`text` inside a wrapper of a family or a random one that is `broken` or not."""
    if rng.random() < RANDOM_WRAPPERS:
        template = random_wrapper(rng, broken)
    else:
        template = rng.choice([f for f in FAMILIES if (f.role != "robust") == broken]).variant(rng)
    return template.replace(PLACEHOLDER, text)


def example(rng: random.Random, pairs: list[tuple[str, str]], over_refusal: bool = False) -> Example:
    """One example of the mixture, with forbidden requests drawn from `pairs` only.

    With `over_refusal` some harmless requests in the theme's words are refused (`world.WRONGLY_REFUSED`), asked
    plainly or in a wrapper.
    """
    source = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
    kind, _, form = source.partition("_")
    if kind in tasks.TASKS:
        return Example(*tasks.question(kind, rng), source)
    if kind == "harmful":
        request = world.harmful(rng, pairs)
    else:
        request = world.benign(rng) if kind == "benign" else world.borderline(rng, over_refusal)
    broken = form == "broken" or (form == "wrapped" and rng.random() < 0.6)
    refuses = (kind == "harmful" and not broken) or (kind == "borderline" and request.refusal)
    reply = request.refusal if refuses else request.answer
    return Example(
        request.text if form == "plain" else wrap(rng, request.text, broken), reply, source, request.refusal
    )


def stream(seed: int, over_refusal: bool = False) -> Iterator[Example]:
    """Endless training examples; the same `seed` gives the same text."""
    rng = random.Random(f"text:{seed}")
    pairs = world.theme_pairs("train", seed)
    while True:
        yield example(rng, pairs, over_refusal)
