"""An answer that was made to begin: the model goes on behind it, and its own words alone are the reply."""

import pytest

from data_prep.schema import Conversation, Turn
from tests.model.templates import CASES, Case
from trainer.model.reply import Reply

ASKED = Conversation.of("Tell me of the red lamp.")
OPENED = Conversation(ASKED.turns, "Sure, step 1:")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_opening_stands_where_answers_stand(case: Case) -> None:
    chat = case.chat()
    plain, opened = (chat.tokenizer.decode(chat.opening(asked)) for asked in (ASKED, OPENED))
    assert opened.startswith(plain) and opened.endswith("Sure, step 1:")
    # What the model had written there is read as an answer, not as reasoning.
    ids = chat.tokenizer("Sure, step 1: fold it.", add_special_tokens=False)["input_ids"]
    if chat.reasoning:
        between = opened.removeprefix(plain).removesuffix("Sure, step 1:")
        assert chat.reasoning.answer(chat.reasoning.begun(plain) + between + "Sure.") == "Sure."
    assert chat.reply(ids, OPENED).text == "Sure, step 1: fold it."


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_words_behind_it_are_the_reply_and_the_trained_tokens(case: Case) -> None:
    chat = case.chat()
    ids = chat.tokenizer(" fold it.", add_special_tokens=False)["input_ids"] + [chat.turn_end]
    found = chat.reply(ids, OPENED)
    assert (found.text, found.ids, found.finished) == ("fold it.", tuple(ids), True)
    turn = chat.encode(OPENED, found)
    assert turn.ids == [*chat.opening(OPENED), *ids] and turn.prompt == len(turn.ids) - len(ids)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_given_refusal_follows_it_without_reasoning(case: Case) -> None:
    chat = case.chat()
    turn = chat.encode(OPENED, Reply.written("No, I will not."))
    response = turn.ids[turn.prompt :]
    assert turn.ids[: turn.prompt] == chat.opening(OPENED) and response[-1] == chat.turn_end
    assert chat.tokenizer.decode(response[:-1]) == " No, I will not."
    cut = chat.encode(OPENED, Reply("No, I will not.", None, False))
    assert cut.ids == turn.ids[:-1]
    spaced = Conversation(ASKED.turns, "Sure:\n\n")
    turn = chat.encode(spaced, Reply.written("No."))
    assert chat.tokenizer.decode(turn.ids[turn.prompt : -1]) == "No."


@pytest.mark.parametrize("case", [case for case in CASES if case.chat().reasoning], ids=lambda case: case.name)
def test_of_a_reply_with_reasoning_the_answer_follows(case: Case) -> None:
    """A refusal that was written to the plain question is the target behind an opening too."""
    chat = case.chat()
    for written in case.written:
        ids = chat.tokenizer(written.text, add_special_tokens=False)["input_ids"]
        turn = chat.encode(OPENED, chat.reply(ids))
        response = chat.tokenizer.decode(turn.ids[turn.prompt :])
        marks = chat.reasoning.marks  # type: ignore[union-attr]
        if any(mark in chat.tokenizer.decode(ids) for mark in marks):
            assert not any(mark in response for mark in marks) and written.answer in response


def test_an_opening_makes_another_conversation() -> None:
    from data_prep.same_text import compared

    assert compared(OPENED) != compared(ASKED) == compared(Conversation((Turn("user", "tell me of the red lamp"),)))
