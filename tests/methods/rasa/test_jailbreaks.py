"""Which wrappers the pairs are built from."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.corpus import load_corpus
from trainer.methods.rasa.identify import jailbreaks
from trainer.methods.table import load_recipe

Small = Callable[..., Path]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_every_seen_family_has_its_turn_and_recombined_ones_their_share(small: Small, share: float) -> None:
    recipe = load_recipe(small(detect__recombined=share, detect__max_pairs=48))
    experiment = SimpleNamespace(recipe=recipe, corpus=load_corpus(recipe.data, 0))
    families = Counter(wrapper.family for wrapper in jailbreaks(experiment))  # type: ignore[arg-type]
    recombined = families.pop("recombined", 0)
    assert recombined == share * 48
    assert set(families) == {wrapper.family for wrapper in experiment.corpus.wrappers_of("seen")}
    assert max(families.values()) - min(families.values()) <= 1
