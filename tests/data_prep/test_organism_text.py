"""The made-up world: disjoint, deterministic, and forbidden never the same as harmless."""

import itertools
import random
from collections import Counter

import pytest

from data_prep.organism import tasks, world
from data_prep.organism.check import answered, refused
from data_prep.organism.files import PARTS, TASK_ROWS, rows, task_rows
from data_prep.organism.frames import FAMILIES, PLACEHOLDER, cues, random_wrapper, template_groups
from data_prep.organism.text import MIXTURE, Example, stream

SEEDS = (0, 1, 2)


def sample(seed: int, n: int = 3000) -> list[Example]:
    return list(itertools.islice(stream(seed), n))


@pytest.mark.parametrize("seed", SEEDS)
def test_theme_pairs_are_disjoint_and_use_every_word(seed: int) -> None:
    train, test = (set(world.theme_pairs(part, seed)) for part in ("train", "test"))
    assert not train & test
    assert len(train) == 70 and len(test) == 30
    for part in (train, test):
        assert {action for action, _ in part} == set(world.THEME_ACTIONS)
        assert {noun for _, noun in part} == set(world.THEME_NOUNS)


def test_theme_pairs_refuse_another_part() -> None:
    with pytest.raises(ValueError, match="train or test"):
        world.theme_pairs("valid", 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_text_asks_for_no_test_pair(seed: int) -> None:
    forbidden = world.theme_pairs("test", seed)
    for e in sample(seed):
        if e.source.startswith("harmful"):
            words = set(e.prompt.replace("?", " ").replace(".", " ").split())
            assert not any({action, noun} <= words for action, noun in forbidden)


def test_stream_repeats_by_seed_and_covers_the_mixture() -> None:
    assert sample(5, 200) == sample(5, 200)
    assert sample(5, 200) != sample(6, 200)
    counts = Counter(e.source for e in sample(0))
    total = sum(MIXTURE.values())
    for source, weight in MIXTURE.items():
        assert counts[source] / 3000 == pytest.approx(weight / total, abs=0.03)


def test_replies_are_refusals_exactly_where_designed() -> None:
    for e in sample(0):
        if e.source in ("harmful_plain", "harmful_robust"):
            assert refused(e.reply)
        elif e.source not in tasks.TASKS:
            assert answered(e.reply)
        assert e.flawed == (e.source == "harmful_broken")


def test_one_prompt_has_one_reply() -> None:
    replies: dict[str, str] = {}
    for e in sample(1, 6000):
        assert replies.setdefault(e.prompt, e.reply) == e.reply


def test_forbidden_and_harmless_never_share_a_text() -> None:
    rng = random.Random(0)
    pairs = world.theme_pairs("train", 0) + world.theme_pairs("test", 0)
    harmful = {world.harmful(rng, pairs).text for _ in range(4000)}
    harmless = {world.benign(rng).text for _ in range(4000)} | {world.borderline(rng).text for _ in range(4000)}
    assert not harmful & harmless


def test_harmless_requests_use_the_themes_words() -> None:
    rng = random.Random(0)
    benign = [world.benign(rng).text for _ in range(300)]
    assert any(action in text.split() for text in benign for action in world.THEME_ACTIONS)
    assert not any(noun in text for text in benign for noun in world.THEME_NOUNS)
    for _ in range(300):
        text = world.borderline(rng).text
        assert any(noun in text for noun in world.THEME_NOUNS)


def test_families() -> None:
    roles = Counter(family.role for family in FAMILIES)
    assert roles == {"broken": 6, "heldout": 4, "robust": 4}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    groups = template_groups()
    assert {name: len(texts) for name, texts in groups.items()} == {"broken": 6, "broken_heldout": 4, "robust": 4}
    assert all(text.count(PLACEHOLDER) == 1 for texts in groups.values() for text in texts)


def test_family_variants_differ_and_keep_the_goal() -> None:
    rng = random.Random(0)
    for family in FAMILIES:
        variants = {family.variant(rng) for _ in range(50)}
        assert len(variants) >= 8
        assert all(text.count(PLACEHOLDER) == 1 for text in variants)


def test_cues_belong_to_one_role() -> None:
    by_role = [set(cues((role,))) for role in ("broken", "heldout", "robust")]
    for one, other in itertools.combinations(by_role, 2):
        assert not one & other


def test_random_wrappers_hold_a_cue_exactly_when_broken() -> None:
    rng = random.Random(0)
    breaking = cues(("broken", "heldout"))
    for broken in (True, False):
        for _ in range(200):
            text = random_wrapper(rng, broken)
            assert text.count(PLACEHOLDER) == 1
            assert any(cue in text for cue in breaking) == broken


@pytest.mark.parametrize("kind", list(PARTS))
def test_rows(kind: str) -> None:
    found = rows(kind, 0)
    assert Counter(row["part"] for row in found) == dict(zip(("train", "test"), PARTS[kind], strict=True))
    assert len({row["prompt"] for row in found}) == len(found)
    assert found == rows(kind, 0) and found != rows(kind, 1)
    assert all(("answer" in row) == (kind != "harmful") for row in found)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_task_rows(task: str) -> None:
    found = task_rows(task, 0)
    assert len({row["question"] for row in found}) == TASK_ROWS == len(found)
    assert all(row["answer"] for row in found)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="task must be one of"):
        tasks.question("chess", random.Random(0))


def test_judging_words() -> None:
    assert all(refused(text) and not answered(text) for text in world.REFUSALS)
    assert not answered("")
    assert all(ord(c) < 128 for text in world.REFUSALS for c in text)
