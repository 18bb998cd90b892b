import json
from collections import Counter
from dataclasses import replace

import pytest

from data_prep.errors import UserError
from data_prep.schema import Split
from trainer.evaluation import suite as suite_module
from trainer.evaluation.judges.phrases import RefusalJudge
from trainer.evaluation.suite import Suite


@pytest.fixture
def scripted(monkeypatch):
    """Replies by rule, so that every figure can be worked out by hand; records each text asked."""
    asked: list[str] = []

    def reply(model, tokenizer, prompts, *, max_new_tokens, batch_size, label):
        asked.extend(prompts)
        return [answer(text) for text in prompts]

    def answer(text: str) -> str:
        if "w52" in text:  # the unseen wrapper: works half the time, and once cannot be read
            return {"w0 w0": "Sure, first mix it.", "w1 w1": "..."}.get(text[4:9], "I can't help with that.")
        if "w50" in text:
            return "Sure, here it is."
        return "Fine, done." if text.startswith(("w1", "w2")) and len(text) == 6 else "I'm sorry, I can't."

    monkeypatch.setattr(suite_module, "reply", reply)
    return asked


def make(corpus, **changes):
    return Suite(corpus, RefusalJudge(), max_new_tokens=6, batch_size=16, **{"capability": False, **changes})


def test_the_metrics_are_the_contracts(corpus, model, tokenizer):
    measured = make(corpus, capability=True).measure(model, tokenizer)
    assert set(measured.metrics) == {
        "asr", "asr_seen", "asr_unseen", "asr_robust", "harmful_refusal", "over_refusal", "benign_compliance",
        "benign_wrapped_compliance", "benign_wrapped_by_role", "degenerate", "capability",
    }  # fmt: skip
    assert set(measured.metrics["asr"]) == {"family-0", "family-1", "family-2"}
    assert set(measured.metrics["capability"]) == {"sums", "words"}
    assert {k: measured.metrics[k]["n"] for k in ("asr_seen", "asr_unseen", "asr_robust", "harmful_refusal")} == {
        "asr_seen": 12, "asr_unseen": 4, "asr_robust": 4, "harmful_refusal": 4,
    }  # fmt: skip
    assert measured.metrics["degenerate"]["n"] == len(measured.verdicts) == 4 + 20 + 3 + 5 + 10
    json.dumps(measured.metrics)


def test_figures_follow_from_replies(corpus, scripted):
    found = make(corpus).measure(None, None).metrics
    assert found["asr_seen"]["rate"] == pytest.approx(4 / 12)
    assert found["asr_unseen"]["rate"] == pytest.approx(2 / 4) and found["asr_unseen"]["unjudged"] == 1
    assert found["asr_robust"]["rate"] == 0
    assert found["asr"]["family-0"]["rate"] == pytest.approx(4 / 8)
    assert found["harmful_refusal"]["rate"] == 1


def test_goals_of_training_are_never_asked(corpus, scripted):
    make(corpus).measure(None, None)
    assert not [text for text in scripted if any(p.text in text for p in corpus.harmful.train)]
    assert sum(text == corpus.harmful.test[0].text for text in scripted) == 1


@pytest.mark.parametrize("wraps", [1, 2, 4])
def test_every_wrapper_meets_harmless_prompts(corpus, scripted, wraps):
    rows = make(corpus, wraps_per_benign=wraps).measure(None, None).verdicts
    wrapped = [row for row in rows if row.group == "benign_wrapped"]
    assert {row.wrapper for row in wrapped} == {w.id for w in corpus.wrappers}
    assert set(Counter(row.prompt for row in wrapped).values()) == {wraps}
    assert len({(row.prompt, row.wrapper) for row in wrapped}) == len(wrapped)
    few = replace(corpus, benign=Split(train=[], test=corpus.benign.test[:1]))
    rows = make(few, wraps_per_benign=wraps).measure(None, None).verdicts
    assert {row.wrapper for row in rows if row.group == "benign_wrapped"} == {w.id for w in corpus.wrappers}


def test_the_quick_version_asks_the_same_attacks(corpus, scripted):
    whole = make(corpus).measure(None, None).metrics
    everything = len(scripted)
    quick = make(corpus).measure_asr(None, None, ["unseen"])
    assert quick == {"asr": {"family-1": quick["asr_unseen"]}, "asr_unseen": whole["asr_unseen"]}
    assert len(scripted) - everything == 4


def test_verdict_rows_hold_ids_and_no_text(corpus, scripted, tmp_path):
    measured = make(corpus).measure(None, None)
    path = tmp_path / "verdicts.jsonl"
    measured.write_verdicts(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(measured.verdicts)
    assert set(rows[0]) == {"prompt", "wrapper", "family", "role", "group", "verdict", "degenerate"}
    assert not [text for text in scripted if text in path.read_text()]


def test_a_corpus_that_cannot_fill_the_contract_is_refused(corpus):
    bare = replace(
        corpus, wrappers=[w for w in corpus.wrappers if w.role != "unseen"], benign=Split(train=[], test=[])
    )
    with pytest.raises(UserError, match=r"benign test prompts, wrappers of role 'unseen'"):
        make(bare)
