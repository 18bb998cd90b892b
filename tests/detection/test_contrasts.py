"""Contrasts: the compared span is the one that is meant, and only its tokens are counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.schema import Conversation, Prompt, Wrapper
from tests.tiny import TOP_K, tiny_chat, tiny_model
from trainer.detection import contrasts
from trainer.detection.pairs import Pair
from trainer.model.chat import ChatTurn
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.routing import record

CHAT = tiny_chat()
TOKENIZER = CHAT.tokenizer
WRAPPER = Wrapper("w:0", "w", "seen", "w40 [X] w41", "[X]")
REFUSAL, UNSAFE = Reply.written("w9"), Reply.written("w30 w31")
PAIRS = [
    Pair(Prompt(f"g:{i}", Conversation.of(f"w{i} w{i + 1}"), "harmful"), WRAPPER, REFUSAL, UNSAFE) for i in range(3)
]


def words(turn: ChatTurn) -> tuple[str, str]:
    """(text before the span, text of the span)."""
    return TOKENIZER.decode(turn.ids[: turn.prompt]), TOKENIZER.decode(turn.ids[turn.prompt :])


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_safety_compares_a_refusal_and_the_unsafe_reply_to_the_same_jailbroken_prompt() -> None:
    (first, *_) = contrasts.safety(CHAT, PAIRS, None)
    assert words(first.x1) == ("<user> w40 w0 w1 w41 <assistant>", "w9 <eos>")
    assert words(first.x2) == ("<user> w40 w0 w1 w41 <assistant>", "w30 w31 <eos>")
    (fixed, *_) = contrasts.safety(CHAT, PAIRS, "w50 w51")
    assert words(fixed.x1)[1] == "w50 w51 <eos>"


def test_safety_takes_the_data_sets_unsafe_replies_where_it_is_told_to() -> None:
    prompt = Prompt("h:0", Conversation.of("w1"), "harmful", answer="w30")
    (found,) = contrasts.safety_from_answers(CHAT, [prompt], "w9")
    assert words(found.x1) == ("<user> w1 <assistant>", "w9 <eos>")
    assert words(found.x2) == ("<user> w1 <assistant>", "w30 <eos>")
    with pytest.raises(UserError, match="prompt 'h:1' has no unsafe reply"):
        contrasts.safety_from_answers(CHAT, [prompt, Prompt("h:1", Conversation.of("w1"), "harmful")], "w9")


def test_faithfulness_compares_the_question_alone(tmp_path: Path) -> None:
    path = lines(tmp_path / "f.jsonl", {"document": "w1 w2 w5", "question": "w5 w6"})
    (found,) = contrasts.faithfulness(CHAT, path)
    assert words(found.x1) == ("<user> <unk> w1 w2 w5 <unk>", "w5 w6")
    assert words(found.x2) == ("<user> <unk>", "w5 w6")


def test_custom_pairs_compare_the_last_occurrence_of_their_span(tmp_path: Path) -> None:
    x1 = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w1 w2"}]
    x2 = [{"role": "user", "content": "w1 w2 w8"}]
    (found,) = contrasts.custom(CHAT, lines(tmp_path / "c.jsonl", {"id": "p", "x1": x1, "x2": x2, "span": "w1 w2"}))
    assert words(found.x1) == ("<user> w1 w2 w3 <assistant>", "w1 w2")
    assert words(found.x2) == ("<user>", "w1 w2")


def test_custom_pairs_without_a_span_compare_the_last_reply(tmp_path: Path) -> None:
    x1 = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    x2 = [*x1, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]
    (found,) = contrasts.custom(CHAT, lines(tmp_path / "c.jsonl", {"x1": x1, "x2": x2}))
    assert words(found.x1)[1] == "w2 <eos>"
    assert words(found.x2) == ("<user> w1 <assistant> w2 <eos> <user> w3 <assistant>", "w4 w5 <eos>")


USER = [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p7", "x1": USER, "x2": USER, "span": "w9"}, "pair 'p7': x1: the span of 2 characters is not found"),
        ({"id": "p7", "x1": USER, "x2": USER, "span": " "}, "pair 'p7': x1: the span of 1 characters is not found"),
        ({"x1": USER, "x2": USER}, "pair 'line 1': x1: without 'span' the last message must be the assistant's"),
        ({"id": "p7", "x1": USER}, "pair 'p7': key 'x2' is missing"),
        ({"id": "p7", "x1": USER, "x2": "w1"}, "pair 'p7': x2 must be a list of messages"),
        ({"id": "p7", "x1": USER, "x2": USER, "spam": "w1"}, "unknown key of pair 'p7'.*did you mean 'span'"),
        ([1], "line 1: expected an object, found list"),
    ],
)
def test_a_faulty_pair_is_named_by_its_id_and_never_quoted(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        contrasts.custom(CHAT, lines(tmp_path / "c.jsonl", row))
    said = str(refused.value).replace(str(tmp_path), "")
    assert "\n" not in said and "w1" not in said


def test_an_empty_or_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no pairs"):
        contrasts.custom(CHAT, path)
    path.write_text("{")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        contrasts.custom(CHAT, path)


def test_counts_are_of_the_span_inside_the_whole_sequence() -> None:
    """Cutting a sequence off behind its span leaves the span's routing as it is in the whole one."""
    backbone = Backbone.of(tiny_model()).check()
    found = contrasts.safety(CHAT, PAIRS, None)
    counts = contrasts.count_contrasts(backbone, CHAT, found, batch_size=2)
    for i, contrast in enumerate(found):
        for side, turn in ((counts.anchor, contrast.x1), (counts.adversarial, contrast.x2)):
            longer = torch.tensor([[*turn.ids, 20, 21, 22]])
            with torch.no_grad(), record(backbone) as trace:
                backbone.model(longer)
            span = trace.index_TK[1][turn.prompt : len(turn.ids)]
            assert side.hits_PLE[i, 1].tolist() == torch.bincount(span.flatten(), minlength=8).tolist()


def test_the_table_obeys_the_papers_invariants_and_says_both_sides_right() -> None:
    backbone = Backbone.of(tiny_model()).check()
    counts = contrasts.count_contrasts(backbone, CHAT, contrasts.safety(CHAT, PAIRS, None), 2)
    table = contrasts.activation_table(counts)
    n1, n2 = 3 * 2, 3 * 3  # refusals of one word, replies of two, each with <eos>
    assert (table.a1 + table.d1 == n1).all() and (table.a2 + table.d2 == n2).all()
    by_layer = table.groupby("layer")
    assert (by_layer.a1.sum() == TOP_K * n1).all() and (by_layer.a2.sum() == TOP_K * n2).all()
    np.testing.assert_allclose(by_layer.delta.sum(), 0.0, atol=1e-12)
    np.testing.assert_allclose(by_layer.gate_mass.sum(), 0.0, atol=0.5)
    np.testing.assert_allclose(table.delta, table.a1 / n1 - table.a2 / n2)
    np.testing.assert_allclose(table.score, -table.delta)
    shares = counts.anchor.hits_PLE / 2 - counts.adversarial.hits_PLE / 3
    np.testing.assert_allclose(table.pair_delta, shares.mean(0).ravel())
    agreement = (np.sign(shares) == np.sign(table.delta.to_numpy().reshape(3, 8))).mean(0)
    np.testing.assert_allclose(table.pair_agreement, agreement.ravel())
