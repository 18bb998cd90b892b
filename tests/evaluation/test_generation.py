import logging

import pytest
import torch

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.generation import left_pad, reply
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.recipe.sections import ModelSection


def ask(model, tokenizer, prompts, batch_size=8, max_new_tokens=8):
    asked = [Conversation.of(prompt) for prompt in prompts]
    chat = Chat.of(model, tokenizer, ModelSection(name_or_path="tiny"))
    return reply(model, chat, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, label="test")


def test_replies_do_not_depend_on_the_batch_size_or_order(model, tokenizer, prompts):
    one_by_one = ask(model, tokenizer, prompts, batch_size=1)
    assert len(set(one_by_one)) > len(prompts) // 2, "a model that always says the same would prove nothing"
    assert ask(model, tokenizer, prompts, batch_size=5) == one_by_one
    assert ask(model, tokenizer, prompts, batch_size=64) == one_by_one
    assert ask(model, tokenizer, prompts[::-1], batch_size=7) == one_by_one[::-1]


def test_reply_equals_a_greedy_loop_written_by_hand(model, tokenizer, prompts):
    model.eval()
    ids = tokenizer(f"<user> {prompts[3]} <assistant>", add_special_tokens=False)["input_ids"]
    new: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    finished = new[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert ask(model, tokenizer, [prompts[3]]) == [Reply(text, tuple(new), finished)]


def test_a_reply_ends_with_the_token_that_ended_the_turn_or_at_the_limit(model, tokenizer, prompts):
    full = ask(model, tokenizer, prompts)
    assert not any(found.finished for found in full) and {len(found.ids) for found in full} == {8}
    stop = full[3].ids[2]
    model.generation_config.eos_token_id = [1, stop]
    cut = ask(model, tokenizer, prompts, batch_size=64)
    assert {found.finished for found in cut} == {True, False}, "one batch holds both"
    for whole, found in zip(full, cut, strict=True):
        ids = whole.ids[: whole.ids.index(stop) + 1] if stop in whole.ids else whole.ids
        assert found == Reply(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, stop in whole.ids)


def test_no_prompts_give_no_replies(model, tokenizer):
    assert ask(model, tokenizer, []) == []


def test_the_callers_state_is_put_back_even_after_an_error(model, tokenizer, prompts, monkeypatch):
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side = "right"
    shipped = model.generation_config
    before = [module.training for module in model.modules()]
    ask(model, tokenizer, prompts[:3])
    assert [module.training for module in model.modules()] == before
    assert tokenizer.padding_side == "right" and model.generation_config is shipped

    def fails(**_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(model, tokenizer, prompts[:1])
    assert [module.training for module in model.modules()] == before and model.generation_config is shipped


def test_sampling_defaults_of_a_checkpoint_neither_bend_nor_warn(model, tokenizer, prompts, caplog, recwarn):
    plain = ask(model, tokenizer, prompts)
    shipped = model.generation_config
    shipped.do_sample, shipped.temperature, shipped.top_p = True, 0.6, 0.9
    shipped.repetition_penalty, shipped.no_repeat_ngram_size = 1.8, 2
    caplog.set_level(logging.WARNING, "transformers")
    logging.getLogger("transformers").propagate = True
    assert ask(model, tokenizer, prompts) == plain
    assert not caplog.records and not [w for w in recwarn if "generat" in str(w.message).lower()]


def test_every_end_of_turn_token_of_the_checkpoint_stops(model, tokenizer, prompts):
    full = ask(model, tokenizer, prompts)
    chosen = next(reply for reply in full if len(set(reply.text.split())) > 4)
    stop = chosen.text.split()[3]
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(stop)]
    cut = ask(model, tokenizer, prompts)[full.index(chosen)]
    assert len(cut.text.split()) <= 4 and chosen.text.startswith(cut.text)


def test_a_tokenizer_without_pad_token_works(model, tokenizer, prompts):
    with_pad = ask(model, tokenizer, prompts)
    tokenizer.pad_token = None
    assert ask(model, tokenizer, prompts) == with_pad
    assert tokenizer.pad_token is None


def test_a_padding_token_outside_of_the_embedding_pads_no_worse(model, tokenizer, prompts):
    inside = ask(model, tokenizer, prompts)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    assert ask(model, tokenizer, prompts) == inside


def test_a_prompt_too_long_for_the_model_is_said_not_cut(model, tokenizer):
    with pytest.raises(UserError, match=r"^evaluate\.max_new_tokens: .*prompt 1 .*70 tokens"):
        ask(model, tokenizer, ["w1", " ".join(["w1"] * 68)])


def test_left_pad_puts_the_real_tokens_last():
    ids, mask = left_pad([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_behind_an_opening_the_model_goes_on_word_by_word(model, tokenizer, prompts):
    """The opening is asked, not written: the reply is what a greedy loop adds behind it, in any batch."""
    chat = Chat.of(model, tokenizer, ModelSection(name_or_path="tiny"))
    asked = [Conversation.of(text) for text in prompts]
    asked = [Conversation(one.turns, "w1 w2 w3") if i % 2 else one for i, one in enumerate(asked)]
    found = reply(model, chat, asked, max_new_tokens=6, batch_size=4, label="test")
    alone = [reply(model, chat, [one], max_new_tokens=6, batch_size=1, label="test")[0] for one in asked]
    assert found == alone
    model.eval()
    new = tokenizer(f"<user> {prompts[3]} <assistant> w1 w2 w3", add_special_tokens=False)["input_ids"]
    start = len(new)
    for _ in range(6):
        with torch.no_grad():
            new.append(int(model(torch.tensor([new])).logits[0, -1].argmax()))
    assert list(found[3].ids) == new[start:] and "w1 w2 w3" not in found[3].text
    turn = chat.encode(asked[3], found[3])
    assert turn.ids == new and turn.prompt == start
