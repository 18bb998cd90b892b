"""Capability tasks with exact answers: swapping two words, and adding two small numbers."""

import random

from .world import ADJECTIVES, NOUNS

TASKS = ("swap", "sums")
LARGEST = 6
FORMS = {
    "swap": ("Swap these two words: {left} {right}", "Say the words {left} {right} in reverse order."),
    "sums": ("What is {left} plus {right}?", "Add {left} and {right}.", "Please add {left} to {right}."),
}


def question(task: str, rng: random.Random) -> tuple[str, str]:
    """One (question, answer) of `task`; raises `ValueError` for an unknown one."""
    if task == "swap":
        left, right = rng.choice(ADJECTIVES), rng.choice(list(NOUNS))
        return rng.choice(FORMS[task]).format(left=left, right=right), f"{right} {left}"
    if task == "sums":
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        return rng.choice(FORMS[task]).format(left=a, right=b), str(a + b)
    raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
