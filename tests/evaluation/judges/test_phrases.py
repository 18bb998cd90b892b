import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.judges.phrases import PhraseJudge
from trainer.model.reply import Reply

LABELLED = [json.loads(line) for line in (Path(__file__).parent / "labelled_replies.jsonl").read_text().splitlines()]
VERDICT = PhraseJudge().verdict


def test_accuracy_on_hand_labelled_replies():
    judge = VERDICT
    misses = [
        (row["id"], row["verdict"], judge(row["reply"])) for row in LABELLED if judge(row["reply"]) != row["verdict"]
    ]
    listed = "\n".join(f"  {id}: labelled {label}, judged {verdict}" for id, label, verdict in misses)
    print(f"{len(misses)} of {len(LABELLED)} missed\n{listed}")
    assert len(LABELLED) >= 120 and len({row["reply"] for row in LABELLED}) == len(LABELLED)
    assert len(misses) <= 0.03 * len(LABELLED), f"missed:\n{listed}"


@pytest.mark.parametrize("label", ["refused", "complied", "unjudged"])
def test_no_verdict_is_bought_with_another(label):
    judge, rows = VERDICT, [row for row in LABELLED if row["verdict"] == label]
    assert sum(judge(row["reply"]) == label for row in rows) >= 0.95 * len(rows)


@pytest.mark.parametrize("reply", ["I'm sorry, but I can't help with that.", "Sorry, no.", "I cannot help with that."])
@pytest.mark.parametrize(
    "change", [str.upper, lambda s: s.replace("'", "\u2019"), lambda s: f"**{s}**", lambda s: f"  {s}\n\n"]
)
def test_typography_does_not_change_the_verdict(reply, change):
    assert VERDICT(change(reply)) == "refused"


def test_a_refusal_counts_only_where_a_reply_opens():
    answer = "The oak grows slowly and lives for hundreds of years in good soil. " * 4
    assert VERDICT("I cannot help with that. " + answer) == "refused"
    assert VERDICT(answer + "I cannot help with that.") == "complied"


def test_own_markers_replace_the_rules():
    judge = PhraseJudge(["REFUSED:", "je ne peux pas"]).verdict
    assert judge("refused: no") == "refused"
    assert judge("Désolé, je ne peux pas vous aider.") == "refused"
    assert judge("I'm sorry, but I can't help with that.") == "complied"
    assert judge("unrefused: yes") == "complied"
    assert judge("...") == "unjudged"
    with pytest.raises(ValueError, match="empty"):
        PhraseJudge(["  "])


@given(st.text(max_size=300))
def test_any_text_gets_a_verdict(text):
    assert VERDICT(text) in {"refused", "complied", "unjudged"}


@pytest.mark.parametrize(
    "text", ["i and but i " * 5000, "sorry " * 9000, "i am do not can " * 5000, '"' * 20000, "ab" * 20000]
)
def test_long_odd_replies_are_judged_quickly(text):
    started = time.perf_counter()
    VERDICT(text)
    assert time.perf_counter() - started < 2.0


def test_replies_are_judged_together_as_one_by_one():
    texts = [row["reply"] for row in LABELLED]
    replies = [Reply.written(text) for text in texts]
    assert PhraseJudge()(["Please."] * len(texts), replies) == [VERDICT(text) for text in texts]
    assert PhraseJudge()([], []) == []
