"""What a chat refuses at load, in one line, and what it makes of odd tokenizers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.schema import Conversation, Turn
from tests.model.templates import CASES, MIXTRAL, Scripted, byte_tokenizer, shipped
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.recipe.sections import ModelSection

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"
ASKED = Conversation.of("Tell me of the red lamp.")


def chat_of(template: str, special: tuple[str, ...] = (), **section: Any) -> Chat:
    tokenizer = byte_tokenizer(template, "</s>", special)
    model: Any = Scripted(tokenizer, [])
    return Chat.of(model, tokenizer, ModelSection(name_or_path="m", **section))


def refused(message: str, template: str, special: tuple[str, ...] = (), **section: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        chat_of(template, special, **section)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "special", "mark"),
    [
        (PLAIN + "{# #}<seed:think>", (), "<seed:think>"),
        (PLAIN + "{{ '<thought>' if false }}", (), "<thought>"),
        (PLAIN, ("<|reasoning_start|>",), "<|reasoning_start|>"),
        (PLAIN + "{% if enable_thinking %}Think first.{% endif %}", (), "enable_thinking"),
        (shipped("muse_glimmer"), ("<|start|>", "<|message|>"), "reasoning_strength"),
        (PLAIN + "<think></think><|channel|>", (), "</think>"),
    ],
)
def test_reasoning_that_is_not_understood_is_refused(template: str, special: tuple[str, ...], mark: str) -> None:
    said = rf"^model.name_or_path: .* mark reasoning by '{re.escape(mark)}', which is not understood; "
    refused(said + r"allowed: one of </think> <think>, .*enable_thinking: false\)$", template, special)


def test_reasoning_that_is_turned_off_need_not_be_understood() -> None:
    template = PLAIN + "{% if enable_thinking %}Think first.{% endif %}"
    assert chat_of(template, chat_template_kwargs={"enable_thinking": False}).reasoning is None
    assert chat_of(PLAIN + "{# thinking and <thought> in a remark #}").reasoning is None


def test_a_template_without_a_system_role_refuses_system_prompts_and_system_turns() -> None:
    refused(
        "^model.system_prompt: the chat template of '' has no system role; allowed: null", MIXTRAL, system_prompt="Hi."
    )
    refused("^model.system_prompt: ", "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            system_prompt="Hi.")  # fmt: skip
    chat = chat_of(MIXTRAL)
    with pytest.raises(
        UserError, match=r"^data: a conversation has a system turn, but the chat template of '' has no"
    ):
        chat.opening(Conversation((Turn("system", "Be brief."), *ASKED.turns)))


def test_a_template_that_folds_the_system_turn_into_the_users_takes_a_system_prompt() -> None:
    folds = (
        "{% set first = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ first if loop.first }}{{ m.content }}"
        "{{ eos_token }}{% endfor %}assistant: "
    )
    chat = chat_of(folds, system_prompt="Be brief.")
    assert "user: Be brief. Tell me" in chat.tokenizer.decode(chat.opening(ASKED))


def test_keys_that_the_template_does_not_know_and_keys_of_ours_are_refused() -> None:
    qwen = shipped("qwen3")
    refused("^model.chat_template_kwargs: 'enable_thinkng' changes nothing: ", qwen,
            chat_template_kwargs={"enable_thinkng": False})  # fmt: skip
    refused("^model.chat_template_kwargs: 'add_generation_prompt' is set by the product", qwen,
            chat_template_kwargs={"add_generation_prompt": False})  # fmt: skip


def test_the_keys_reach_prompts_and_given_answers() -> None:
    case = next(case for case in CASES if case.name == "qwen3, thinking off")
    chat = case.chat()
    turn = chat.encode(ASKED, Reply.written("Yes."))
    assert chat.tokenizer.decode(turn.ids).endswith("assistant\n<think>\n\n</think>\n\nYes.<|im_end|>")


@pytest.mark.parametrize("pad", ["[PAD]", None])
def test_padding_is_a_token_that_the_model_has(pad: str | None) -> None:
    tokenizer = byte_tokenizer(PLAIN, "</s>")
    model: Any = Scripted(tokenizer, [])
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    chat = Chat.of(model, tokenizer, ModelSection(name_or_path="m"))
    assert chat.padding == tokenizer.eos_token_id < model.config.vocab_size
    tokenizer.add_special_tokens({"eos_token": "<later>"})
    assert Chat.of(model, tokenizer, ModelSection(name_or_path="m")).padding == 0


def test_a_token_without_an_embedding_is_refused_by_name() -> None:
    tokenizer = byte_tokenizer(PLAIN, "</s>")
    model: Any = Scripted(tokenizer, [])
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    chat = Chat.of(model, tokenizer, ModelSection(name_or_path="m"))
    with pytest.raises(
        UserError, match=r"^model.name_or_path: the tokenizer of '' writes token 259 \('<\|user\|>'\), "
    ):
        chat.opening(ASKED)


def test_a_conversation_without_a_known_end_has_none() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ", None)
    model: Any = Scripted(tokenizer, [])
    chat = Chat.of(model, tokenizer, ModelSection(name_or_path="m"))
    assert chat.turn_end is None and chat.stops == ()
    assert not chat.reply(list(range(20))).finished


def test_a_given_answer_keeps_what_the_template_puts_before_it_where_tokens_merge() -> None:
    """The opening's last line break and the next one are a single token in the whole conversation."""
    chat = chat_of(
        "{% for m in messages %}{{ m.role }}\n{{ '\\nSo: ' if m.role == 'assistant' }}{{ m.content }}</s>"
        "{% endfor %}{{ 'assistant\\n' if add_generation_prompt }}"
    )
    turn = chat.encode(ASKED, Reply.written("Yes."))
    assert chat.tokenizer.decode(turn.ids[turn.prompt :]) == "\nSo: Yes.</s>"
