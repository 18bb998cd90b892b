import json
from collections import Counter
from dataclasses import replace

import pytest

from data_prep.config import DataConfig
from data_prep.errors import UserError
from data_prep.schema import Corpus, Split
from tests.model.templates import CASES
from tests.tiny import tiny_chat
from trainer.evaluation import suite as suite_module
from trainer.evaluation.judges.judge import judge_of
from trainer.evaluation.suite import Suite
from trainer.model.reply import Reply
from trainer.recipe.sections import EvaluateSection

CHAT = tiny_chat()


@pytest.fixture
def scripted(monkeypatch):
    """Replies by rule, so that every figure can be worked out by hand; records each text asked."""
    asked: list[str] = []

    def reply(model, chat, prompts, *, max_new_tokens, batch_size, label):
        texts = [prompt.text for prompt in prompts]
        asked.extend(texts)
        return [Reply.written(answer(text)) for text in texts]

    def answer(text: str) -> str:
        if "w52" in text:  # the unseen wrapper: works half the time, and once cannot be read
            return {"w0 w0": "Sure, first mix it.", "w1 w1": "..."}.get(text[4:9], "I can't help with that.")
        if "w50" in text:
            return "Sure, here it is."
        return "Fine, done." if text.startswith(("w1", "w2")) and len(text) == 6 else "I'm sorry, I can't."

    monkeypatch.setattr(suite_module, "reply", reply)
    return asked


@pytest.fixture
def make(data):
    """A suite of a corpus; keys are those of the recipe's section."""

    def made(corpus, data=data, capability=False, **keys):
        section = EvaluateSection(max_new_tokens=6, batch_size=16, **keys)
        return Suite(corpus, judge_of(section), section, data, capability=capability)

    return made


def test_the_metrics_are_those_of_evaluation_json(make, corpus, model, chat):
    measured = make(corpus, capability=True).measure(model, chat)
    assert set(measured.metrics) == {
        "asr", "asr_seen", "asr_unseen", "asr_robust", "harmful_refusal", "over_refusal", "benign_compliance",
        "benign_wrapped_compliance", "benign_wrapped_by_role", "degenerate", "capability", "finished",
        "finished_benign", "reply_tokens",
    }  # fmt: skip
    assert set(measured.metrics["asr"]) == {"family-0", "family-1", "family-2"}
    assert set(measured.metrics["capability"]) == {"sums", "words"}
    assert {k: measured.metrics[k]["n"] for k in ("asr_seen", "asr_unseen", "asr_robust", "harmful_refusal")} == {
        "asr_seen": 12, "asr_unseen": 4, "asr_robust": 4, "harmful_refusal": 4,
    }  # fmt: skip
    assert measured.metrics["degenerate"]["n"] == len(measured.verdicts) == 4 + 20 + 3 + 5 + 10
    json.dumps(measured.metrics)


def test_figures_follow_from_replies(make, corpus, scripted):
    found = make(corpus).measure(None, CHAT).metrics
    assert found["asr_seen"]["rate"] == pytest.approx(4 / 12)
    assert found["asr_unseen"]["rate"] == pytest.approx(2 / 4) and found["asr_unseen"]["unjudged"] == 1
    assert found["asr_robust"]["rate"] == 0
    assert found["asr"]["family-0"]["rate"] == pytest.approx(4 / 8)
    assert found["harmful_refusal"]["rate"] == 1


def test_goals_of_training_are_never_asked(make, corpus, scripted):
    make(corpus).measure(None, CHAT)
    assert not [text for text in scripted if any(p.text in text for p in corpus.harmful.train)]
    assert sum(text == corpus.harmful.test[0].text for text in scripted) == 1


@pytest.mark.parametrize("wraps", [1, 2, 4])
def test_every_wrapper_meets_harmless_prompts(make, corpus, scripted, wraps):
    rows = make(corpus, wraps_per_benign=wraps).measure(None, CHAT).verdicts
    wrapped = [row for row in rows if row.group == "benign_wrapped"]
    assert {row.wrapper for row in wrapped} == {w.id for w in corpus.wrappers}
    assert set(Counter(row.prompt for row in wrapped).values()) == {wraps}
    assert len({(row.prompt, row.wrapper) for row in wrapped}) == len(wrapped)
    few = replace(corpus, benign=Split(train=[], test=corpus.benign.test[:1]))
    rows = make(few, wraps_per_benign=wraps).measure(None, CHAT).verdicts
    assert {row.wrapper for row in rows if row.group == "benign_wrapped"} == {w.id for w in corpus.wrappers}


def test_the_quick_version_asks_the_same_attacks(make, corpus, scripted):
    whole = make(corpus).measure(None, CHAT).metrics
    everything = len(scripted)
    quick = make(corpus).measure_asr(None, CHAT, ["unseen"])
    assert quick == {"asr": {"family-1": quick["asr_unseen"]}, "asr_unseen": whole["asr_unseen"]}
    assert len(scripted) - everything == 4


def test_verdict_rows_hold_ids_and_no_text(make, corpus, scripted, tmp_path):
    measured = make(corpus).measure(None, CHAT)
    path = tmp_path / "verdicts.jsonl"
    measured.write_verdicts(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(measured.verdicts)
    keys = {"prompt", "wrapper", "family", "role", "group", "verdict", "degenerate", "tokens", "finished"}
    assert set(rows[0]) == keys
    assert not [text for text in scripted if text in path.read_text()]


def test_a_part_that_is_given_but_holds_nothing_to_ask_is_refused(make, corpus):
    bare = replace(
        corpus, wrappers=[w for w in corpus.wrappers if w.role != "unseen"], benign=Split(train=[], test=[])
    )
    with pytest.raises(UserError, match=r"benign test prompts, wrappers of role 'unseen'"):
        make(bare)


ATTACKS = {"asr", "asr_seen", "asr_unseen", "asr_robust"}
WRAPPED = {"benign_wrapped_compliance", "benign_wrapped_by_role"}


def only(parts: set[str], data: DataConfig, corpus: Corpus) -> tuple[Corpus, DataConfig]:
    """The data section with these parts alone, and what loading it gives."""
    nothing = Split([], [])
    splits = {name: nothing for name in ("harmful", "benign", "borderline") if name not in parts}
    wrappers = corpus.wrappers if "jailbreaks" in parts else []
    absent = dict.fromkeys({"harmful", "benign", "borderline", "jailbreaks"} - parts)
    return replace(corpus, wrappers=wrappers, **splits), data.model_copy(update=absent)


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        ({"harmful"}, {"harmful_refusal"}),
        ({"harmful", "jailbreaks"}, {"harmful_refusal"} | ATTACKS),
        ({"benign"}, {"benign_compliance"}),
        ({"benign", "jailbreaks"}, {"benign_compliance"} | WRAPPED),
        ({"borderline"}, {"over_refusal"}),
        ({"harmful", "benign", "borderline"}, {"harmful_refusal", "benign_compliance", "over_refusal"}),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_a_figure_whose_prompts_are_not_in_the_recipe_is_left_out(make, corpus, data, scripted, parts, figures):
    whole = make(corpus).measure(None, CHAT).metrics
    suite = make(*only(parts, data, corpus))
    found = suite.measure(None, CHAT).metrics
    assert set(found) == figures | {"degenerate", "capability"}
    assert {name: found[name] for name in figures} == {name: whole[name] for name in figures}
    assert suite.attacks is ({"harmful", "jailbreaks"} <= parts)


def test_capability_alone_is_measured_alone(make, corpus, data, model, chat):
    measured = make(*only(set(), data, corpus), capability=True).measure(model, chat)
    assert set(measured.metrics) == {"capability"} and set(measured.metrics["capability"]) == {"sums", "words"}
    assert measured.verdicts == []


@pytest.mark.parametrize("parts", [set(), {"jailbreaks"}])
def test_nothing_to_measure_is_refused(make, corpus, data, parts):
    bare, given = only(parts, data, corpus)
    with pytest.raises(UserError, match="nothing to measure; expected one of harmful, benign, borderline"):
        make(bare, given)
    with pytest.raises(UserError, match=r"nothing to measure; .*, capability$"):
        make(replace(bare, tasks=[]), given, capability=True)


@pytest.mark.parametrize("name", ["harmful", "benign", "borderline"])
def test_every_part_that_is_given_must_hold_test_prompts(make, corpus, name):
    untested = replace(corpus, **{name: Split(getattr(corpus, name).train, [])})
    with pytest.raises(UserError, match=f"^evaluation needs {name} test prompts; the recipe's data section provides"):
        make(untested)


@pytest.mark.parametrize("role", ["seen", "unseen"])
def test_jailbreaks_of_goals_need_seen_and_unseen_wrappers(make, corpus, data, role):
    without = replace(corpus, wrappers=[w for w in corpus.wrappers if w.role != role])
    with pytest.raises(UserError, match=f"^evaluation needs wrappers of role '{role}'; "):
        make(without)
    benign, given = only({"benign", "jailbreaks"}, data, without)
    assert make(benign, given).attacks is False
    with pytest.raises(UserError, match=r"^evaluation needs wrappers; "):
        make(replace(benign, wrappers=[]), given)


def test_attack_success_without_goals_or_wrappers_is_refused(make, corpus, data, scripted):
    for parts, message in (({"benign", "jailbreaks"}, "harmful test prompts"), ({"harmful"}, "no wrapper has a role")):
        with pytest.raises(UserError, match=message):
            make(*only(parts, data, corpus)).measure_asr(None, CHAT, ["seen", "unseen"])


def test_every_reply_is_judged_with_its_question_in_view(corpus, data, scripted):
    seen: list[tuple[str, str]] = []

    def judge(prompts, replies):
        seen.extend(zip((prompt.text for prompt in prompts), (reply.text for reply in replies), strict=True))
        return ["refused"] * len(replies)

    Suite(corpus, judge, EvaluateSection(), data, capability=False).measure(None, CHAT)
    assert [prompt for prompt, _ in seen] == scripted


def test_lengths_and_ends_of_replies_are_measured_for_all_and_for_harmless_prompts(make, corpus, monkeypatch):
    def reply(model, chat, prompts, **limits):
        """Harmless prompts get 2 and 4 tokens in turn, an end each; the others 6 tokens and no end."""
        harmless = [{"w10 w0", "w11 w1"} & {prompt.text} for prompt in prompts]
        return [Reply("w1", (5,) * (6 if not h else 2 + 2 * (h == {"w10 w0"})), bool(h)) for h in harmless]

    monkeypatch.setattr(suite_module, "reply", reply)
    two = replace(corpus, benign=Split([], corpus.benign.test[:2]), wrappers=[])
    found = make(two, data=DataConfig(harmful=SOURCE, benign=SOURCE, borderline=SOURCE)).measure(None, CHAT)
    tokens = found.metrics["reply_tokens"]
    assert tokens["benign"] == {"mean": 3.0, "median": 3.0, "n": 2, "cut": 0}
    assert tokens["all"] == {"mean": pytest.approx((7 * 6 + 6) / 9), "median": 6.0, "n": 9, "cut": 7}
    assert found.metrics["finished"]["rate"] == pytest.approx(2 / 9)
    assert found.metrics["finished_benign"]["rate"] == 1
    assert {(row.tokens, row.finished) for row in found.verdicts} == {(6, False), (4, True), (2, True)}


SOURCE = {"path": "prompts.jsonl", "test": 1}


def test_a_reply_that_is_still_reasoning_is_unjudged_and_loops_count_wherever_they_are(make, corpus, monkeypatch):
    case = next(case for case in CASES if case.name == "qwen3")
    chat = case.chat()
    texts = [
        "<think>\nThe first of many thoughts",
        "<think>\n" + "and so on " * 12,
        "<think>\nI cannot.\n</think>\n\nA red lamp.",
    ]

    def reply(model, chat, prompts, **limits):
        ids = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [chat.reply(ids[i % 3]) for i in range(len(prompts))]

    monkeypatch.setattr(suite_module, "reply", reply)
    only_benign = replace(corpus, benign=Split([], corpus.benign.test[:3]), wrappers=[], harmful=Split([], []))
    bare = replace(only_benign, borderline=Split([], []))
    found = make(bare, data=DataConfig(benign=SOURCE)).measure(None, chat)
    assert [(row.verdict, row.degenerate) for row in found.verdicts] == [
        ("unjudged", False), ("unjudged", True), ("complied", False),
    ]  # fmt: skip
    assert found.metrics["benign_compliance"]["unjudged"] == 2
