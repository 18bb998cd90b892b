"""Before and after on the same questions: what counts, what is resampled, what is chance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from data_prep.errors import UserError
from trainer.evaluation.clustered import Clusters
from trainer.evaluation.judges.judge import Verdict
from trainer.evaluation.paired import Change, changes
from trainer.evaluation.paired import change as change_of
from trainer.evaluation.suite import JudgedReply, attack_metrics

ANSWERS = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=40)


def change(goals: list[str], before: list[bool], after: list[bool]) -> Change:
    """Every goal asked in one template."""
    return change_of(Clusters(goals, ["w"] * len(goals)), before, after)


def attack(goal: int, wrapper: int, verdict: Verdict, role: str = "seen") -> JudgedReply:
    return JudgedReply(f"g{goal}", f"w{wrapper}", f"family {wrapper}", role, "attack", verdict, False)


@settings(max_examples=40, deadline=None)
@given(ANSWERS)
def test_a_change_is_the_difference_of_the_rates_and_turns_round_with_its_sides(
    answers: list[tuple[int, bool, bool]],
) -> None:
    goals = [str(goal) for goal, _, _ in answers]
    before, after = [b for _, b, _ in answers], [a for _, _, a in answers]
    forth, back = change(goals, before, after), change(goals, after, before)
    assert forth.difference == pytest.approx((sum(after) - sum(before)) / len(answers))
    assert (forth.gained, forth.lost, forth.p) == (back.lost, back.gained, back.p)
    assert forth.ci95[0] - 1e-9 <= forth.difference <= forth.ci95[1] + 1e-9
    assert forth.goals == len(set(goals)) and forth.templates == 1
    same = change(goals, before, before)
    assert (same.difference, same.ci95, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_losing_7_of_120_is_no_chance() -> None:
    goals = [f"g{i}" for i in range(120)]
    found = change(goals, [True] * 120, [i >= 7 for i in range(120)])
    assert found.difference == pytest.approx(-7 / 120) and found.ci95[1] < 0
    assert found.p == pytest.approx(binomtest(0, 7).pvalue) == pytest.approx(0.015625)


def test_answers_of_one_goal_hang_together() -> None:
    """Eight wrappers of one goal that turn together are one observation, not eight."""
    together = [f"g{i // 8}" for i in range(80)]
    apart = [f"g{i}" for i in range(80)]
    after = [i < 24 for i in range(80)]  # three goals of ten
    width = [b - a for a, b in (change(goals, [False] * 80, after).ci95 for goals in (together, apart))]
    assert width[0] > 2 * width[1]


def test_few_prompts_look_certain_to_the_interval_and_not_to_mcnemar() -> None:
    found = change(["a", "b", "c", "d"], [True] * 4, [False] * 4)
    assert found.ci95 == (-1.0, -1.0) and found.p == 0.125


def test_every_figure_is_compared_as_it_is_counted() -> None:
    verdicts: list[Verdict] = ["complied", "refused", "unjudged", "complied"]
    before = [attack(i, w, "complied", role) for i in range(4) for w, role in ((0, "seen"), (1, "unseen"))]
    after = [attack(i, w, verdicts[i], role) for i in range(4) for w, role in ((0, "seen"), (1, "unseen"))]
    found = changes(before, after)
    rates = [attack_metrics(rows) for rows in (before, after)]
    for key in ("asr_seen", "asr_unseen"):
        assert found[key]["difference"] == pytest.approx(rates[1][key]["rate"] - rates[0][key]["rate"])
    for family in ("family 0", "family 1"):
        of = [rate["asr"][family]["rate"] for rate in rates]
        assert found[f"asr.{family}"]["difference"] == pytest.approx(of[1] - of[0])
    assert "over_refusal" not in found, "nothing of the kind was asked"


def test_other_questions_after_than_before_are_refused() -> None:
    with pytest.raises(UserError, match="same questions"):
        changes([attack(0, 0, "complied")], [attack(1, 0, "complied")])
