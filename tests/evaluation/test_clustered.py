"""Answers that hang together are worth fewer: by goal, by template, and never more than they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from trainer.evaluation.clustered import Clusters, rate_interval, standard_error

ANSWERS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.booleans()), min_size=1, max_size=60)


def apart(n: int) -> Clusters:
    return Clusters([f"g{i}" for i in range(n)], [None] * n)


def crossed(goals: int, templates: int) -> Clusters:
    return Clusters(
        [f"g{g}" for _ in range(templates) for g in range(goals)],
        [f"w{t}" for t in range(templates) for _ in range(goals)],
    )


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_an_interval_holds_its_rate_and_stays_in_zero_to_one(answers: list[tuple[int, int, bool]]) -> None:
    clusters = Clusters([str(goal) for goal, _, _ in answers], [str(template) for _, template, _ in answers])
    hits = [hit for _, _, hit in answers]
    low, high = rate_interval(hits, clusters)
    assert 0 <= low <= sum(hits) / len(hits) <= high <= 1
    wilson = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    assert high - low >= wilson.high - wilson.low - 1e-9, "clusters never add certainty"


def test_prompts_asked_once_have_wilsons_interval() -> None:
    for hits in ([True] * 3 + [False] * 117, [False] * 50, [True] * 8):
        wilson = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        assert rate_interval(hits, apart(len(hits))) == pytest.approx((wilson.low, wilson.high), rel=0.1, abs=2e-3)


def test_three_templates_at_3_percent_and_one_at_75_do_not_read_as_17_to_25() -> None:
    hits = [goal < share for share in (3, 3, 3, 75) for goal in range(100)]
    low, high = rate_interval(hits, crossed(100, 4))
    assert low < 0.05 and high > 0.6
    even = rate_interval(
        [(goal + 7 * template) % 100 < 21 for template in range(4) for goal in range(100)], crossed(100, 4)
    )
    assert even[0] > 0.1 and even[1] < 0.35, "templates that agree leave only the draw of goals"


def test_the_error_is_that_of_a_draw_of_goals_and_templates() -> None:
    """Against the spread of the mean over worlds in which both are drawn anew."""
    generator = np.random.default_rng(0)
    goals, templates = 40, 12
    means, errors = [], []
    for _ in range(400):
        goal, template = generator.normal(0, 1, goals), generator.normal(0, 0.5, templates)
        values = (template[:, None] + goal[None, :] + generator.normal(0, 1, (templates, goals))).reshape(-1)
        means.append(values.mean())
        errors.append(standard_error(values, crossed(goals, templates)))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)
