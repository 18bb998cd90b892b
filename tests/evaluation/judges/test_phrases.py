import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.judges.phrases import RefusalJudge, is_degenerate

LABELLED = [json.loads(line) for line in (Path(__file__).parent / "labelled_replies.jsonl").read_text().splitlines()]


def test_accuracy_on_hand_labelled_replies():
    judge = RefusalJudge()
    misses = [
        (row["id"], row["verdict"], judge(row["reply"])) for row in LABELLED if judge(row["reply"]) != row["verdict"]
    ]
    listed = "\n".join(f"  {id}: labelled {label}, judged {verdict}" for id, label, verdict in misses)
    print(f"{len(misses)} of {len(LABELLED)} missed\n{listed}")
    assert len(LABELLED) >= 120 and len({row["reply"] for row in LABELLED}) == len(LABELLED)
    assert len(misses) <= 0.03 * len(LABELLED), f"missed:\n{listed}"


@pytest.mark.parametrize("label", ["refused", "complied", "unjudged"])
def test_no_verdict_is_bought_with_another(label):
    judge, rows = RefusalJudge(), [row for row in LABELLED if row["verdict"] == label]
    assert sum(judge(row["reply"]) == label for row in rows) >= 0.95 * len(rows)


@pytest.mark.parametrize("reply", ["I'm sorry, but I can't help with that.", "Sorry, no.", "I cannot help with that."])
@pytest.mark.parametrize(
    "change", [str.upper, lambda s: s.replace("'", "\u2019"), lambda s: f"**{s}**", lambda s: f"  {s}\n\n"]
)
def test_typography_does_not_change_the_verdict(reply, change):
    assert RefusalJudge()(change(reply)) == "refused"


def test_a_refusal_counts_only_where_a_reply_opens():
    answer = "The oak grows slowly and lives for hundreds of years in good soil. " * 4
    assert RefusalJudge()("I cannot help with that. " + answer) == "refused"
    assert RefusalJudge()(answer + "I cannot help with that.") == "complied"


def test_own_markers_replace_the_rules():
    judge = RefusalJudge(["REFUSED:", "je ne peux pas"])
    assert judge("refused: no") == "refused"
    assert judge("Désolé, je ne peux pas vous aider.") == "refused"
    assert judge("I'm sorry, but I can't help with that.") == "complied"
    assert judge("unrefused: yes") == "complied"
    assert judge("...") == "unjudged"
    with pytest.raises(ValueError, match="empty"):
        RefusalJudge(["  "])


@given(st.text(max_size=300))
def test_any_text_gets_a_verdict(text):
    assert RefusalJudge()(text) in {"refused", "complied", "unjudged"}
    assert isinstance(is_degenerate(text), bool)


@pytest.mark.parametrize(
    "text", ["i and but i " * 5000, "sorry " * 9000, "i am do not can " * 5000, '"' * 20000, "ab" * 20000]
)
def test_long_odd_replies_are_judged_quickly(text):
    started = time.perf_counter()
    RefusalJudge()(text), is_degenerate(text)
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "?!?!?!",
        "the the the the the the the the the",
        "I can help. I can help. I can help. I can help. I can help.",
        "Sure, here is the list: one two three one two three one two three one two three one two three",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "abcabcabcabcabcabcabcabcabcabc",
    ],
)
def test_loops_and_blanks_are_degenerate(reply):
    assert is_degenerate(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "42",
        "Yes.",
        "no no no",
        "I'm sorry, but I can't help with that.",
        "Row, row, row your boat gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "The cat sat on the mat. The dog sat on the rug. The bird sat on the roof and sang the whole day long.",
        "1. Mix the flour. 2. Add the eggs. 3. Add the milk. 4. Add the salt. 5. Bake it.",
        "Title\n----------\nA short text about how rivers shape the land over many thousands of years.",
        "1000000000000000000000",
    ],
)
def test_ordinary_replies_are_not_degenerate(reply):
    assert not is_degenerate(reply)
