"""The mix of training rows: targets from the model itself, harmless twins in the same wrappers, nothing from tests."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from data_prep.errors import UserError
from data_prep.schema import Conversation, Corpus, Prompt, Split, Wrapper
from trainer.model.reply import Reply
from trainer.recipe.sections import RepairSection
from trainer.training.fitting import ABSENT, REFUSED
from trainer.training.repair import TrainingRow
from trainer.training.rows import Answer, Mix, Target, consistency_rows, repair_rows

HARMFUL = [Prompt(f"h:{i}", Conversation.of(f"harm{i}"), "harmful") for i in range(8)]
BENIGN = [Prompt(f"b:{i}", Conversation.of(f"kind{i}"), "benign") for i in range(6)]
BORDERLINE = [Prompt(f"x:{i}", Conversation.of(f"edge{i}"), "borderline") for i in range(4)]
SEEN = [Wrapper(f"s:{i}", f"s{i}", "seen", f"Please obey rule {i}. [X] Answer now.", "[X]") for i in range(2)]
ROBUST = [Wrapper("r:0", "r0", "robust", "Be polite. [X]", "[X]")]
UNSEEN = [Wrapper("u:0", "u0", "unseen", "Forbidden fruit. [X]", "[X]")]
CORPUS = Corpus(
    Split(HARMFUL[:4], HARMFUL[4:]), Split(BENIGN[:3], BENIGN[3:]), Split(BORDERLINE[:2], BORDERLINE[2:]),
    [*SEEN, *ROBUST, *UNSEEN], [],
)  # fmt: skip
REFUSALS = {goal.id: Reply(f"no {goal.id}", (7, 1), True) for goal in HARMFUL[:3]}  # h:3 was not refused
TARGETS = [Target(HARMFUL[i], SEEN[i % 2], REFUSALS[f"h:{i}"]) for i in range(3)]
MIX = RepairSection(recombined=2.0, robust=1.0, anchors=1.0, wrapped_benign=1.0, plain_benign=1.0, borderline=1.0)
NONE = RepairSection(recombined=0.0, robust=0.0, anchors=0.0, wrapped_benign=0.0, plain_benign=0.0, borderline=0.0)


def answered(prompts: Sequence[Conversation]) -> list[Answer]:
    return [
        Answer(Reply("no", (5, 1), True), "refused")
        if "edge0" in prompt.text
        else Answer(Reply(f"answer to {prompt.text}", (5, 1), True), "complied")
        for prompt in prompts
    ]


def mix(section: RepairSection = MIX, seed: int = 0, corpus: Corpus = CORPUS) -> Mix:
    return repair_rows(TARGETS, REFUSALS, corpus, section, answered, seed)


def rows(section: RepairSection = MIX, seed: int = 0) -> list[TrainingRow]:
    return mix(section, seed).rows


def test_every_kind_of_row_is_there_as_often_as_the_mix_says() -> None:
    counts = Counter(row.source for row in rows() if row.stream == "repair")
    assert counts == {"jailbreak": 3, "recombined wrapper": 6, "robust wrapper": 3, "plain harmful": 3}
    retained = Counter(row.source for row in rows() if row.stream == "retain")
    assert retained["plain benign"] == 3
    assert retained["borderline"] <= 3, "an answer that is a refusal is dropped"


def test_targets_are_the_models_own_refusals_and_own_answers() -> None:
    for row in rows():
        if row.stream == "repair":
            assert row.reply in REFUSALS.values()
        else:
            assert row.reply.text == f"answer to {row.prompt.text}"


def test_harmless_twins_stand_in_the_same_wrapper_instances_as_harmful_goals() -> None:
    def frame(text: str) -> str:
        for prompt in [*HARMFUL, *BENIGN, *BORDERLINE]:
            text = text.replace(prompt.text, "[X]")
        return text

    harmful = {frame(row.prompt.text) for row in rows() if row.stream == "repair" and row.source != "plain harmful"}
    twins = {frame(row.prompt.text) for row in rows() if row.source == "wrapped benign"}
    assert twins <= harmful
    assert len(twins) >= 0.6 * len(harmful)


def test_nothing_of_a_test_split_or_an_unseen_wrapper_is_trained_on() -> None:
    held_out = [p.text for p in [*HARMFUL[4:], *BENIGN[3:], *BORDERLINE[2:]]] + ["Forbidden fruit"]
    for seed in range(5):
        assert not any(text in row.prompt.text for row in rows(seed=seed) for text in held_out)


def test_only_goals_that_the_model_refuses_are_targets() -> None:
    assert not any("harm3" in row.prompt.text for row in rows())


def test_the_rows_depend_on_the_seed_and_on_nothing_else() -> None:
    assert rows(seed=1) == rows(seed=1)
    assert rows(seed=1) != rows(seed=2)


def test_an_empty_mix_leaves_only_the_jailbreaks() -> None:
    assert [row.source for row in rows(NONE)] == ["jailbreak"] * 3


def test_consistency_rows_pair_each_jailbreak_with_its_plain_goal() -> None:
    made = consistency_rows(TARGETS, rows(), benign_weight=1.0)
    assert [row.anchor_prompt for row in made] == [target.goal.conversation for target in TARGETS]
    assert all(row.anchor_prompt.text in row.adversarial_prompt.text for row in made)
    assert all(row.benign_reply.text.startswith("answer") for row in made)


def test_a_benign_stream_without_harmless_rows_is_refused() -> None:
    bare = rows(NONE)
    with pytest.raises(UserError, match=r"consistency\.benign_weight: 1\.0 needs harmless rows"):
        consistency_rows(TARGETS, bare, benign_weight=1.0)
    assert len(consistency_rows(TARGETS, bare, benign_weight=0.0)) == 3


def test_answers_that_are_not_retained_are_counted_by_source_and_reason() -> None:
    made = mix()
    kept = Counter(row.source for row in made.rows)
    refused = {source: count for (source, reason), count in made.left_out.items() if reason == REFUSED}
    assert kept["borderline"] + refused["borderline"] == 3
    assert kept["wrapped benign"] + refused["wrapped benign"] == 12
    assert sum(refused.values()) == sum(made.left_out.values()) > 0


def test_a_kind_that_the_data_does_not_have_is_refused_or_counted() -> None:
    with pytest.raises(
        UserError, match=r"repair\.borderline: 1\.0 asks for 3 rows 'borderline'; nothing of the kind in"
    ):
        mix(corpus=replace(CORPUS, borderline=Split([], [])))
    bare = mix(corpus=replace(CORPUS, wrappers=[*SEEN, *UNSEEN]))
    assert bare.left_out["robust wrapper", ABSENT] == 3, "a role that data.jailbreaks may leave out"
