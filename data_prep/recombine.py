"""Training wrappers made of the sentences of given ones: a model is to find the goal whatever stands around it."""

import random
import re

from .errors import UserError
from .schema import Wrapper

SENTENCE_END = re.compile(r"(?<=[.!?:\n])\s+")


def recombine(wrappers: list[Wrapper], contexts: list[str], n: int, seed: int) -> list[Wrapper]:
    """`n` training wrappers made of the sentences of `wrappers` and, as harmless surroundings, of `contexts`.

    They teach a model to find the goal whatever stands around it, instead of recognising a template. Each is as long
    as a number of words drawn evenly between 8 and half as much again as the longest template, filled with one kind
    of material: sentences of one template or of all, harmless contexts, loose spans of words, or a mixture. The goal
    stands at the start, at the end or in between, sometimes in a carrying sentence of a template or in quotes. Same
    arguments, same result. All have family `recombined` and role `seen`. Raises `UserError` without wrappers or when
    their placeholders differ.
    """
    if not wrappers:
        raise UserError("recombining needs at least one jailbreak wrapper, found none")
    placeholders = {wrapper.placeholder for wrapper in wrappers}
    if len(placeholders) > 1:
        raise UserError(f"recombined wrappers must share one placeholder, found {len(placeholders)}")
    placeholder = placeholders.pop()
    rng = random.Random(f"recombine:{seed}")
    usable = [text.strip() for text in contexts if text.strip() and placeholder not in text]
    # Turns before, a prefill or an encoding do not survive being taken apart.
    wrappers = [wrapper for wrapper in wrappers if wrapper.one_turn] or wrappers
    material = _Material([_sentences(wrapper) for wrapper in wrappers], usable)
    carriers = [part for wrapper in wrappers for part in SENTENCE_END.split(wrapper.text) if placeholder in part]
    carriers = carriers or [placeholder]
    longest = max(len(wrapper.text.split()) for wrapper in wrappers)
    made = []
    for i in range(n):
        parts = material.fill(rng, rng.randint(8, max(9, longest * 3 // 2)))
        drawn = rng.random()
        goal = rng.choice(carriers) if drawn < 0.3 else f'"{placeholder}"' if drawn < 0.45 else placeholder
        parts.insert(rng.choice((0, len(parts), len(parts), rng.randint(0, len(parts)))), goal)
        made.append(Wrapper(f"recombined:{i}", "recombined", "seen", " ".join(parts), placeholder))
    return made


class _Material:
    """What recombined wrappers are filled with: sentences by template, and harmless contexts (may be empty)."""

    def __init__(self, templates: list[list[str]], contexts: list[str]) -> None:
        self.templates = [sentences for sentences in templates if sentences]
        self.contexts = contexts
        self.sentences = [sentence for sentences in self.templates for sentence in sentences]

    def fill(self, rng: random.Random, words: int) -> list[str]:
        """Parts of at least `words` words in all; empty where there is no material at all."""
        own = rng.sample(one, len(one)) if self.templates and (one := rng.choice(self.templates)) else []
        kind = rng.choice(("template", "sentences", "contexts", "mixed", "spans"))
        parts: list[str] = []
        while self.sentences and sum(len(part.split()) for part in parts) < words:
            now = rng.choice(("sentences", "contexts", "spans")) if kind == "mixed" else kind
            if now == "template" and own:
                parts.append(own.pop())
            elif now == "contexts" and self.contexts:
                parts.append(rng.choice(self.contexts))
            elif now == "spans":
                source = rng.choice(self.contexts if self.contexts and rng.random() < 0.3 else self.sentences).split()
                start = rng.randrange(len(source))
                parts.append(" ".join(source[start : start + rng.randint(2, 15)]))
            else:
                parts.append(rng.choice(self.sentences))
        return parts


def _sentences(wrapper: Wrapper) -> list[str]:
    """The template's sentences with the placeholder and the quotes around it taken out."""
    bare = wrapper.text
    for quoted in (f'"{wrapper.placeholder}"', f"'{wrapper.placeholder}'", wrapper.placeholder):
        bare = bare.replace(quoted, "\n")
    parts = (part.strip() for line in bare.split("\n") for part in SENTENCE_END.split(line))
    return [part for part in parts if any(c.isalnum() for c in part)]
