"""Building pairs: both tests must hold, and what was dropped is accounted for without any text."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.schema import Conversation, Prompt, Wrapper
from tests.model.templates import CASES
from trainer.detection.pairs import PairReport, build_pairs, read_pairs
from trainer.model.reply import Reply, Verdict

GOALS = [Prompt(f"g:{i}", Conversation.of(f"goal{i}"), "harmful") for i in range(6)]
WRAPPERS = [Wrapper(f"w:{i}", f"w{i}", "seen", f"wrap{i} [X]", "[X]") for i in range(3)]


VERDICTS: dict[str, Verdict] = {"no": "refused", "yes": "complied"}


def judge(prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
    assert len(prompts) == len(replies)
    return [VERDICTS.get(reply.text, "unjudged") for reply in replies]


def build(
    plain: str = "no", wrapped: str = "yes", max_pairs: int = 100, odd: dict[str, str] | None = None
) -> PairReport:
    def ask(prompts: Sequence[Conversation], label: str) -> list[Reply]:
        texts = [(odd or {}).get(p.text, wrapped if p.text.startswith("wrap") else plain) for p in prompts]
        return [Reply(text, (7, 9, len(prompt.text)), True) for prompt, text in zip(prompts, texts, strict=True)]

    return build_pairs(GOALS, WRAPPERS, ask, judge, max_pairs, 16)


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
    anchors = [r for r in rows if r["outcome"] == "anchor_refused"]
    assert {r["anchor_reply"] for r in anchors} == {"no"}
    assert {(*r["anchor_ids"], r["anchor_finished"]) for r in anchors} == {(7, 9, len("goal0"), True)}
    assert not [key for r in rows if r not in anchors for key in r if key.endswith(("_reply", "_ids"))]


def test_refusals_and_kept_pairs_are_read_back_as_they_were(tmp_path: Path) -> None:
    report = build(odd={"goal1": "yes", "wrap0 goal0": "no"}, max_pairs=4)
    path = tmp_path / "pairs.jsonl"
    path.write_text(report.jsonl(), encoding="utf-8")
    refusals, kept = read_pairs(path)
    assert set(refusals) == {goal.id for goal in GOALS} - {"g:1"}
    assert kept == [(pair.goal.id, pair.wrapper.id) for pair in report.pairs]
    assert [refusals[goal] for goal, _ in kept] == [pair.anchor_reply for pair in report.pairs]


def test_every_reply_is_judged_with_what_it_answers_in_view() -> None:
    seen: list[tuple[str, str]] = []

    def ask(prompts: Sequence[Conversation], label: str) -> list[Reply]:
        return [Reply.written(f"to {prompt.text}") for prompt in prompts]

    def looking(prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        seen.extend(zip((prompt.text for prompt in prompts), (reply.text for reply in replies), strict=True))
        return ["complied" if prompt.text.startswith("wrap") else "refused" for prompt in prompts]

    build_pairs(GOALS, WRAPPERS, ask, looking, 4, 16)
    assert len(seen) == len(GOALS) + 4
    assert all(text == f"to {prompt}" for prompt, text in seen)


@pytest.mark.parametrize(("every", "wanted", "tries"), [(50, 100, 1000), (50, 100, 16), (1, 256, 16), (3, 64, 16)])
def test_rare_successes_cost_few_calls_and_no_more_jailbreaks_than_allowed(
    every: int, wanted: int, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    goals = [Prompt(f"g:{i}", Conversation.of(f"goal{i}"), "harmful") for i in range(400)]
    wrappers = [Wrapper(f"w:{i}", f"w{i}", "seen", f"wrap{i} [X]", "[X]") for i in range(20)]
    calls: list[int] = []

    def ask(prompts: Sequence[Conversation], label: str) -> list[Reply]:
        if label == "anchor replies":
            return [Reply.written("no") for _ in prompts]
        before = sum(calls)
        calls.append(len(prompts))
        return [Reply.written("no" if (before + i) % every else "yes") for i in range(len(prompts))]

    report = build_pairs(goals, wrappers, ask, judge, wanted, tries)
    allowed = min(400 * 20, tries * wanted)
    assert sum(calls) <= allowed and len(calls) <= 10
    assert len(report.pairs) == min(wanted, -(-allowed // every))
    kept = [row["outcome"] for row in report.rows if row["outcome"] in ("kept", "surplus")]
    assert kept == sorted(kept), "the first ones found are kept"
    said = " ".join(capsys.readouterr().out.split())
    assert ("detect.tries_per_pair=16" in said) == (len(report.pairs) < wanted)


def test_a_model_that_refuses_nothing_is_reported_with_the_numbers() -> None:
    with pytest.raises(UserError, match="no pair survives: the model refuses 0 of 6 plain harmful goals"):
        build(plain="yes")


def test_jailbreaks_that_never_work_are_reported_with_the_numbers() -> None:
    with pytest.raises(UserError, match="no pair survives: 0 of 18 jailbroken goals were answered"):
        build(wrapped="no")


def test_a_refusal_with_its_reasoning_is_read_back_and_trained_as_it_was_written(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gpt-oss")
    chat, written = case.chat(), case.written[0]
    ids = chat.tokenizer(written.text, add_special_tokens=False)["input_ids"]
    refusal = chat.reply(ids)

    def ask(prompts: Sequence[Conversation], label: str) -> list[Reply]:
        return [Reply.written("yes") if prompt.text.startswith("wrap") else refusal for prompt in prompts]

    def judged(prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Verdict]:
        return ["refused" if reply.text == written.answer else "complied" for reply in replies]

    path = tmp_path / "pairs.jsonl"
    path.write_text(build_pairs(GOALS, WRAPPERS, ask, judged, 2, 16).jsonl(), encoding="utf-8")
    refusals, _ = read_pairs(path)
    turn = chat.encode(GOALS[0].conversation, refusals["g:0"])
    assert turn.ids[turn.prompt :] == ids
