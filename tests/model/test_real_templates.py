"""What is trained is what was written, and what is judged is the answer: for the templates of published families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_prep.schema import Conversation, Turn
from tests.model.templates import CASES, Case, Scripted, Written
from trainer.evaluation.generation import reply
from trainer.evaluation.judges.phrases import PhraseJudge
from trainer.model.chat import Chat, pad
from trainer.model.reply import Reply

ASKED = Conversation.of("Tell me of the red lamp.")
JUDGE = PhraseJudge()


def said(case: Case, chat: Chat, text: str) -> tuple[list[int], Reply]:
    """The tokens of a text, and the reply of a model that writes them among two other ones, then pads or goes on."""
    tokenizer: Any = chat.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    other = tokenizer("Hm.", add_special_tokens=False)["input_ids"]
    model: Any = Scripted(tokenizer, [ids, other, ids], case.listed)
    found = reply(model, chat, [ASKED] * 3, max_new_tokens=len(ids), batch_size=2, label="test")
    assert found[0] == found[2] and found[1].ids is not None
    return ids, found[0]


@pytest.mark.parametrize(
    ("case", "written"),
    [pytest.param(case, written, id=f"{case.name} {i}") for case in CASES for i, written in enumerate(case.written)],
)
def test_the_trained_tokens_are_the_written_ones_and_the_judged_text_is_the_answer(
    case: Case, written: Written
) -> None:
    chat = case.chat()
    ids, found = said(case, chat, written.text)
    assert (found.ids, found.text, found.finished) == (tuple(ids), written.answer, written.finished)
    verdict = JUDGE([ASKED], [found])[0]
    assert verdict == ("unjudged" if not written.answer else "refused" if written.answer == NO_ANSWER else verdict)
    turn = chat.encode(ASKED, found)
    assert turn.ids == [*chat.opening(ASKED), *ids] and turn.prompt == len(turn.ids) - len(ids)
    assert (turn.ids[-1] in chat.stops) is written.finished
    batch = pad([turn, chat.encode(ASKED, Reply.written("A longer answer " * 20))], chat.padding)
    assert batch.input_ids_BS[0][batch.response_BS[0]].tolist() == ids
    assert batch.input_ids_BS[0][batch.prompt_BS[0]].tolist() == chat.opening(ASKED)
    assert not (batch.prompt_BS & batch.response_BS).any()


NO_ANSWER = "I cannot help with that."


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_given_answer_stands_where_the_template_puts_one_and_ends_as_the_family_does(case: Case) -> None:
    chat = case.chat()
    turn = chat.encode(ASKED, Reply.written("Yes."))
    response = turn.ids[turn.prompt :]
    assert chat.tokenizer.decode(response) == case.given
    assert turn.ids[: turn.prompt] == chat.opening(ASKED)
    assert chat.turn_end == response[-1] == chat.tokenizer.convert_tokens_to_ids(case.turn_end)
    assert set(chat.stops) == set(chat.tokenizer.convert_tokens_to_ids([case.turn_end, case.eos, *case.listed]))
    # Read back as if the model had written it, it is that answer.
    assert chat.reply(response) == Reply("Yes.", tuple(response), True)
    cut = chat.encode(ASKED, Reply("Yes.", None, False))
    assert cut.ids == turn.ids[:-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_reply_is_cut_behind_the_first_token_that_ends_it(case: Case) -> None:
    chat = case.chat()
    answer = case.written[0].text
    ids = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert chat.reply([*ids, chat.padding, chat.padding]) == chat.reply(ids)
    assert chat.whole(chat.reply(ids)) == chat.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_tokens_that_were_written_are_the_response(case: Case) -> None:
    chat = case.chat()
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 40):
        row = torch.randint(0, len(chat.tokenizer), (length,), generator=generator).tolist()
        found = chat.reply(row)
        assert found.ids is not None and list(found.ids) == row[: len(found.ids)]
        assert len(found.ids) == length or found.finished
        turn = chat.encode(ASKED, found)
        assert turn.ids[turn.prompt :] == list(found.ids)
        for ids in (row, row[::-1]):  # also tokens that no reader would have made
            turn = chat.encode(ASKED, Reply("", tuple(ids), False))
            assert turn.ids[turn.prompt :] == ids and turn.ids[: turn.prompt] == chat.opening(ASKED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_turn_of_a_conversation_is_in_the_prompt(case: Case) -> None:
    chat = case.chat()
    turns = (Turn("user", "First lamp?"), Turn("assistant", "A red one."), Turn("user", "And the next?"))
    text = chat.tokenizer.decode(chat.opening(Conversation(turns)))
    at = [text.index(turn.text) for turn in turns]
    assert at == sorted(at)
    assert text.endswith(chat.tokenizer.decode(chat.opening(ASKED)).rpartition("lamp.")[2])


@pytest.mark.parametrize("case", [case for case in CASES if case.system], ids=lambda case: case.name)
def test_the_system_prompt_opens_every_conversation_that_brings_none(case: Case) -> None:
    chat = case.chat(system_prompt="Speak like a sailor.")
    plain = chat.tokenizer.decode(chat.opening(ASKED))
    assert plain.count("Speak like a sailor.") == 1
    assert plain.index("Speak like a sailor.") < plain.index("red lamp")
    own = Conversation((Turn("system", "Speak like a judge."), *ASKED.turns))
    text = chat.tokenizer.decode(chat.opening(own))
    assert "Speak like a judge." in text and "sailor" not in text
    answered = chat.encode(ASKED, Reply.written("Yes."))
    assert answered.ids[: answered.prompt] == chat.opening(ASKED)
