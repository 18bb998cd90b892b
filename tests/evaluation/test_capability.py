import pytest
import torch

from data_prep.errors import UserError
from data_prep.schema import Conversation, Prompt, Task
from trainer.evaluation.capability import matches, score
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
