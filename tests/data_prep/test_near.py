"""A goal of the test part is in no training part: not in other words, not in a wrapper, not from another source."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DataConfig
from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.families import FAMILIES, GOAL
from data_prep.near import Goals, content_words, words
from data_prep.schema import Corpus

NOUNS = ("lamp", "lantern", "ferry", "orchard", "harbour", "copper", "bellows", "ladder", "kettle", "meadow")
VERBS = ("wake", "paint", "fold", "carry", "bury", "melt", "hide", "tune", "sell", "borrow")
PLACES = ("tower", "cellar", "garden", "attic", "market", "chapel", "bridge", "mill")
FORMS = (
    "How do I {} the {} {} in the {}?",
    "Please {} a {} and a {} near the {}.",
    "Explain step by step how to {} {} {} behind the {}",
)
ONE_TURN = [t.text for templates in FAMILIES.values() for t in templates if GOAL in t.text and t.encoding == "plain"]
THRESHOLD = 0.6


def jaccard(one: str, other: str) -> float:
    a, b = content_words(one), content_words(other)
    return len(a & b) / len(a | b)


def spread(text: str) -> str:
    return f" {' '.join(words(text))} "


def leaks(train: str, goal: str) -> bool:
    """The rule itself, text by text: what `Goals` looks up in an index."""
    held = len(content_words(goal)) >= 3 and len(words(goal)) >= 3 and spread(goal) in spread(train)
    part = len(content_words(train)) >= 3 and len(words(train)) >= 3 and spread(train) in spread(goal)
    return jaccard(train, goal) >= THRESHOLD or held or part


GOAL_TEXTS = st.builds(
    lambda form, verb, one, two, place: form.format(verb, one, two, place),
    st.sampled_from(FORMS),
    st.sampled_from(VERBS),
    st.sampled_from(NOUNS),
    st.sampled_from(NOUNS),
    st.sampled_from(PLACES),
)


def exchanged(text: str, seed: int) -> str:
    """One word less, or another word more."""
    rng, parts = random.Random(seed), text.split()
    if rng.random() < 0.5:
        parts.pop(rng.randrange(len(parts)))
    else:
        parts.insert(rng.randrange(len(parts)), rng.choice(NOUNS))
    return " ".join(parts)


DISGUISES: list[Any] = [
    lambda text, seed: text.upper(),
    lambda text, seed: "\n\t" + text.replace(" ", "  ") + " ",
    lambda text, seed: text.replace("e", "e\u200b"),
    lambda text, seed: text.rstrip("?.") + "!!",
    lambda text, seed: random.Random(seed).choice(ONE_TURN).replace(GOAL, text),
    exchanged,
    lambda text, seed: exchanged(text.title(), seed),
    lambda text, seed: [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why not?"},
    ],
]


def corpus(folder: Path, harmful: list[Any], tested: list[str], **others: list[Any]) -> Corpus:
    sections: dict[str, Any] = {}
    for name, texts in {"harmful": harmful, **others}.items():
        path, test = folder / f"{name}.jsonl", folder / f"{name}-test.jsonl"
        last = tested if name == "harmful" else [f"a {name} row of its own"]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        test.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in last))
        sections[name] = {"path": str(path), "test_path": str(test), "train": len(texts), "test": len(last)}
    return load_corpus(DataConfig.model_validate(sections), 0)


@given(
    tested=st.lists(GOAL_TEXTS, min_size=1, max_size=6, unique=True),
    others=st.lists(GOAL_TEXTS, min_size=1, max_size=8, unique=True),
    attempts=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(range(len(DISGUISES))),
            st.sampled_from(["harmful", "benign", "borderline"]),
            st.integers(0, 99),
        ),
        min_size=1,
        max_size=8,
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_disguise_brings_a_test_goal_into_training(
    tmp_path: Path, tested: list[str], others: list[str], attempts: list[tuple[int, int, str, int]]
) -> None:
    rows: dict[str, list[Any]] = {
        "harmful": [*others, "an unrelated sentence of harmful things"],
        "benign": ["an unrelated sentence of benign things"],
        "borderline": ["an unrelated sentence of borderline matters"],
    }
    for which, disguise, source, seed in attempts:
        rows[source].append(DISGUISES[disguise](tested[which % len(tested)], seed))
    try:
        found = corpus(tmp_path, tested=tested, **rows)
    except UserError as error:
        assert "is either to be refused or to be answered" in str(error)
        return
    for split in (found.harmful, found.benign, found.borderline):
        for prompt in split.train:
            for turn in prompt.conversation.turns:
                assert not any(leaks(turn.text, goal.text) for goal in found.harmful.test)
    # What is no leak stays.
    kept = {prompt.text for prompt in found.harmful.train}
    assert {text for text in others if not any(leaks(text, goal) for goal in tested)} <= kept
    for count in found.rows:
        assert count.read == count.train + count.test + sum(count.dropped.values())


@given(
    goals=st.lists(st.text("ab c\u4e00\u4e8c\u4e09", max_size=12), max_size=6),
    texts=st.lists(st.text("ab c\u4e00\u4e8c\u4e09", max_size=12), max_size=6),
)
@settings(deadline=None)
def test_the_index_finds_what_the_rule_says(goals: list[str], texts: list[str]) -> None:
    index = Goals(goals, THRESHOLD)
    for text in texts:
        expected = any(bool(content_words(text) & content_words(goal)) and leaks(text, goal) for goal in goals)
        assert index.is_near(text) == expected


def test_near_rows_are_counted_and_said(tmp_path: Path) -> None:
    goal = "How do I wake the sleeping wyrm in the tower?"
    found = corpus(
        tmp_path, ["Wake the sleeping wyrm of the tower now", "Paint the ferry"], [goal], benign=["Fold it"]
    )
    assert [p.text for p in found.harmful.train] == ["Paint the ferry"]
    assert found.notes == ["data.harmful: 1 training rows dropped, they are near a harmful goal of the test part"]
    assert found.rows[0].dropped["training rows near a test goal"] == 1


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.harmful: every one of the 1 training rows is near .*near_duplicates"):
        corpus(tmp_path, ["wake the wyrm in the tower"], ["wake the old wyrm in the tower"])


def test_the_rule_can_be_turned_off(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text('{"prompt": "wake the wyrm in the tower"}\n{"prompt": "wake the old wyrm in the tower"}\n')
    source = {"path": str(path), "train": "0:1", "test": "1:2"}
    for near, kept in ((None, 1), (0.9, 1)):
        config = DataConfig.model_validate({"harmful": source, "near_duplicates": near})
        assert len(load_corpus(config, 0).harmful.train) == kept


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("How do I wake a wyrm?", "Tell me how one would WAKE the Wyrm!", True),
        ("Explain how to wake a wyrm", "Please explain to me how I can wake the wyrm", True),
        ("wake the wyrm in the tower", "paint the wyrm in the tower", False),
        ("如何唤醒沉睡的龙", "请问如何唤醒沉睡的龙", True),
        ("如何唤醒沉睡的龙", "如何粉刷仓库的门", False),
        ("stop it", "Do not stop it before noon", False),
    ],
)
def test_what_is_near(one: str, other: str, near: bool) -> None:
    assert Goals([one], THRESHOLD).is_near(other) is near
