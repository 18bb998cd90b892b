"""Building pairs: both tests must hold, and what was dropped is accounted for without any text."""

import json
from collections.abc import Sequence

import pytest

from data_prep.errors import UserError
from data_prep.schema import Prompt, Wrapper
from trainer.detection.pairs import PairReport, build_pairs

GOALS = [Prompt(f"g:{i}", f"goal{i}", "harmful") for i in range(6)]
WRAPPERS = [Wrapper(f"w:{i}", f"w{i}", "seen", f"wrap{i} [X]", "[X]") for i in range(3)]


def judge(reply: str) -> str:
    return {"no": "refused", "yes": "complied"}.get(reply, "unjudged")


def build(
    plain: str = "no", wrapped: str = "yes", max_pairs: int = 100, odd: dict[str, str] | None = None
) -> PairReport:
    def reply(prompts: Sequence[str], label: str) -> list[str]:
        return [(odd or {}).get(p, wrapped if p.startswith("wrap") else plain) for p in prompts]

    return build_pairs(GOALS, WRAPPERS, reply, judge, max_pairs)


def test_every_goal_is_used_before_one_is_used_twice_and_families_stay_balanced() -> None:
    report = build(max_pairs=6)
    assert sorted(p.goal.id for p in report.pairs) == [g.id for g in GOALS]
    assert sorted(p.wrapper.id for p in report.pairs) == ["w:0", "w:0", "w:1", "w:1", "w:2", "w:2"]


def test_all_combinations_are_tried_when_pairs_are_wanted() -> None:
    assert len({(p.goal.id, p.wrapper.id) for p in build().pairs}) == 18


def test_a_pair_that_fails_either_test_is_dropped_whole() -> None:
    report = build(odd={"goal1": "yes", "wrap0 goal0": "no", "wrap2 goal2": ""})
    assert "g:1" not in {p.goal.id for p in report.pairs}
    assert report.counts() == {
        "anchor_refused": 5,
        "anchor_not_refused": 1,
        "kept": 13,
        "jailbreak_failed": 1,
        "unjudged": 1,
    }


def test_the_file_quotes_ids_and_refusals_but_no_goal_and_no_adversarial_reply() -> None:
    text = build(wrapped="yes").jsonl()
    rows = [json.loads(line) for line in text.splitlines()]
    assert "goal0" not in text and '"yes"' not in text
    assert {r["anchor_reply"] for r in rows if r["outcome"] == "anchor_refused"} == {"no"}


def test_a_model_that_refuses_nothing_is_reported_with_the_numbers() -> None:
    with pytest.raises(UserError, match="no pair survives: the model refuses 0 of 6 plain harmful goals"):
        build(plain="yes")


def test_jailbreaks_that_never_work_are_reported_with_the_numbers() -> None:
    with pytest.raises(UserError, match="no pair survives: 0 of 18 jailbroken goals were answered"):
        build(wrapped="no")
