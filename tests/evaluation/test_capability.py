import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.loaders import Source, load
from data_prep.schema import Conversation, Prompt, Task
from trainer.evaluation.answers import matches, reference
from trainer.evaluation.capability import score
from trainer.model.chat import Chat


def task(metric, *pairs):
    prompts = [Prompt(f"p{i}", Conversation.of(text), "capability", answer) for i, (text, answer) in enumerate(pairs)]
    return Task(name="demo", metric=metric, prompts=prompts)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("First 3 + 4 = 7, then 7 * 2 = 14.", "14", True),
        ("The answer is 14, not 15.", "14", False),
        ("It costs $1,200.00 in all.", "1200", True),
        ("It is -5 degrees.", "-5", True),
        ("Seven.", "7", False),
        ("The capital is Paris.", "paris", True),
        ("The Eiffel Tower, of course", "Eiffel tower", True),
        ("It is Parisian.", "Paris", False),
        ("", "Paris", False),
        ("B", "B", True),
        ("(B) because it floats", "B", True),
        ("The answer is B.", "B", True),
        ("A boat is wood, so B", "B", False),
        ("I think so", "B", False),
    ],
)
def test_exact_match_reads_numbers_choices_and_words(text, answer, right):
    assert matches(text, answer) is right


def by_hand(model, tokenizer, pairs):
    right = total = 0
    for text, answer in pairs:
        asked = tokenizer(f"<user> {text} <assistant>", add_special_tokens=False)["input_ids"]
        wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            chosen = model.eval()(torch.tensor([asked + wanted])).logits[0].argmax(-1)[len(asked) - 1 : -1]
        right, total = right + int((chosen == torch.tensor(wanted)).sum()), total + len(wanted)
    return right, total


def test_token_accuracy_counts_answer_tokens_only_whatever_the_batch(model, tokenizer, prompts):
    # The model's own greedy words as part of the reference: otherwise a random model would score zero everywhere.
    pairs = []
    for text in prompts[:9]:
        asked = tokenizer(f"<user> {text} <assistant>", return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            first = tokenizer.decode([int(model.eval()(asked).logits[0, -1].argmax())])
        pairs.append((text, f"{first if first.startswith('w') else 'w9'} " + text[:20].rsplit(" ", 1)[0]))
    right, total = by_hand(model, tokenizer, pairs)
    assert 0 < right < total
    for batch_size in (1, 4, 32):
        rate = score(model, Chat(tokenizer), task("token_accuracy", *pairs), max_new_tokens=4, batch_size=batch_size)
        assert (rate.n, rate.rate) == (total, pytest.approx(right / total))


def test_exact_match_scores_generated_replies(model, tokenizer, prompts):
    from trainer.evaluation.generation import reply

    said = reply(
        model, Chat(tokenizer), list(map(Conversation.of, prompts[:4])), max_new_tokens=6, batch_size=4, label="test"
    )
    pairs = [(text, " ".join(words.text.split()[:2]) or "w1") for text, words in zip(prompts[:4], said, strict=True)]
    pairs.append((prompts[4], "absent"))
    assert score(model, Chat(tokenizer), task("exact_match", *pairs), max_new_tokens=6, batch_size=2).rate == 0.8


def test_a_missing_answer_and_an_unknown_metric_are_named(model, tokenizer):
    with pytest.raises(UserError, match=r"demo.*p1"):
        score(model, Chat(tokenizer), task("exact_match", ("w1", "w2"), ("w3", None)), max_new_tokens=4, batch_size=2)
    with pytest.raises(UserError, match="metric"):
        score(model, Chat(tokenizer), task("bleu", ("w1", "w2")), max_new_tokens=4, batch_size=2)
    with pytest.raises(UserError, match="demo"):
        score(model, Chat(tokenizer), task("token_accuracy"), max_new_tokens=4, batch_size=2)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 5 + 6 = 11. The answer is 11.", "5 and 6 are 11.\n#### 11", True),
        ("It is 5 + 6 = 12.", "5 and 6 are 11.\n#### 11", False),
        ("The rationale: 5 and 6 are 11. So 12.", "5 and 6 are 11.\n#### 11", False),
        ("It is $1,200.", "#### 1,200", True),
        ("**72**", "72", True),
        ("\\boxed{72}", "72", True),
        ("It is 18 dollars.", "$18", True),
        ("It is 18 euros.", "$18", False),
        ("-$5", "-5", True),
        ("10-15", "15", True),
        ("about 1.5e3", "1500", True),
        ("1\u202f200", "1200", True),
        ("\u22125", "-5", True),
        ("72", "72%", True),
        ("It is 5 kilometres.", "5 km", True),
        ("5 m", "5 km", False),
        ("12", "12 Angry Men", False),
        ("It is 12 Angry Men.", "12 Angry Men", True),
        ("A good question. The answer is B", "B", True),
        ("**Answer:** (B)", "B", True),
        ("The answer is not A. Answer: C", "C", True),
        ("The answer is a matter of taste", "A", False),
        ("b)", "B", True),
        ("I'm sure", "I", False),
    ],
)
def test_published_answers_currencies_units_and_choices(text, answer, right):
    assert matches(text, answer) is right


def test_an_answer_of_a_rationale_alone_is_missing():
    assert reference("Because.\n#### ") == "" and reference("#### 4\nmore") == "#### 4\nmore"


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_reply_and_answer_can_be_compared(text, answer):
    assert matches(text, answer) in (True, False)


GSM8K = (
    Path(os.environ.get("ROUTEALIGN_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "data/gsm8k/test.jsonl"
)


@pytest.mark.skipif(not GSM8K.is_file(), reason="no public benchmark files at hand")
def test_every_published_gsm8k_answer_is_scored_right_and_wrong():
    answers = [row.answer for row in load("qa", Source(str(GSM8K), "capability"))]
    assert len(answers) == 1319
    assert all(matches(f"Let us see. The answer is {reference(answer)}.", answer) for answer in answers)
    assert not any(matches(f"Let us see. The answer is 1{reference(answer)}.", answer) for answer in answers)
