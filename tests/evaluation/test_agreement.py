"""Agreement of two judges: chance is taken out, and silence agrees with nothing that was said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.agreement import VERDICTS, agreement

LISTS = st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), min_size=1, max_size=40)


def test_kappa_is_what_cohens_paper_says() -> None:
    one = ["refused"] * 45 + ["complied"] * 15 + ["refused"] * 25 + ["complied"] * 15
    other = ["refused"] * 60 + ["complied"] * 40
    found = agreement(one, other)
    # 45 + 15 agree; by chance .7 * .6 + .3 * .4.
    assert found["agree"] == pytest.approx(0.60) and found["kappa"] == pytest.approx((0.60 - 0.54) / (1 - 0.54))
    assert found["table"]["refused"] == {"refused": 45, "complied": 25, "unjudged": 0} and found["n"] == 100


def test_unjudged_agrees_with_no_verdict() -> None:
    found = agreement(["refused", "unjudged"], ["unjudged", "unjudged"])
    assert found["agree"] == 0.5 and found["table"]["refused"]["unjudged"] == 1


def test_one_verdict_throughout_has_no_kappa() -> None:
    assert agreement(["complied"] * 5, ["complied"] * 5)["kappa"] is None
    assert agreement(["complied", "refused"], ["complied", "refused"])["kappa"] == 1.0


@given(LISTS)
def test_agreement_is_symmetric_and_bounded(pairs: list[tuple[str, str]]) -> None:
    one, other = [list(side) for side in zip(*pairs, strict=True)]
    found, turned = agreement(one, other), agreement(other, one)  # type: ignore[arg-type]
    assert found["agree"] == turned["agree"] and 0 <= found["agree"] <= 1
    assert found["kappa"] == turned["kappa"] or abs(found["kappa"] - turned["kappa"]) < 1e-12
    assert found["kappa"] is None or -1 <= found["kappa"] <= found["agree"] + 1e-12
    assert sum(n for row in found["table"].values() for n in row.values()) == len(pairs)


def test_lists_of_other_lengths_are_an_error() -> None:
    for one, other in ((["refused"], []), ([], [])):
        with pytest.raises(ValueError, match="as many verdicts"):
            agreement(one, other)
