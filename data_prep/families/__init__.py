"""Families of jailbreaks, written for this project: generic wrappers around a goal, without a request of their own.

They measure and train how a model withstands a kind of wrapper; they hold no goal, so they do nothing alone. Published
collections are longer and stronger: bring their files with `data.jailbreaks.path`.
"""

from . import (
    encoded,
    long_story,
    multi_turn,
    nested_fiction,
    persuasion,
    prefill,
    prefix_injection,
    role_play,
    suffix_injection,
)
from .template import GOAL, Template

__all__ = ["FAMILIES", "GOAL", "Template"]

FAMILIES: dict[str, tuple[Template, ...]] = {
    "role-play": role_play.TEMPLATES,
    "persuasion": persuasion.TEMPLATES,
    "nested-fiction": nested_fiction.TEMPLATES,
    "encoding": encoded.TEMPLATES,
    "prefix-injection": prefix_injection.TEMPLATES,
    "suffix-injection": suffix_injection.TEMPLATES,
    "multi-turn": multi_turn.TEMPLATES,
    "prefill": prefill.TEMPLATES,
    "long-story": long_story.TEMPLATES,
}
"""Name of a family -> its templates, in a fixed order: their places stand in ids."""
