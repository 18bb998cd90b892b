"""Activation counts: exact, span-aware, and blind to padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.schema import Conversation, Prompt, Wrapper
from tests.moe.families import FAMILIES as MOE_FAMILIES
from tests.tiny import FAMILIES, NUM_LAYERS, TOP_K, tiny_chat, tiny_model, tiny_tokenizer
from trainer.detection.counts import count_activations, per_sequence
from trainer.detection.pairs import Pair
from trainer.detection.saliency import gradient_saliency, refusal_loss
from trainer.detection.scores import score, stability
from trainer.model.chat import Chat, pad
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.routing import record

WRAPPER = Wrapper("w:0", "w", "seen", "w1 w2 [X] w3", "[X]")
PAIRS = [
    Pair(
        Prompt(f"g:{i}", Conversation.of(" ".join(f"w{(i * 7 + j) % 50}" for j in range(2 + i))), "harmful"),
        WRAPPER,
        Reply.written("w40 w41 w42"),
        Reply.written("w5 " * (i + 1)),
    )
    for i in range(5)
]


@pytest.mark.parametrize("tokens", ["prompt", "response", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_counted_token_activates_exactly_k_experts_per_layer(family: str, tokens: str) -> None:
    backbone = Backbone.of(tiny_model(family)).check()
    counts = count_activations(backbone, tiny_chat(), PAIRS, tokens, batch_size=2)
    for side in (counts.adversarial, counts.anchor):
        assert (side.hits_PLE.sum(-1) == TOP_K * side.tokens_P[:, None]).all()
    frame = counts.frame()
    assert (frame.a1 + frame.d1 == counts.adversarial.tokens).all()
    assert (frame.groupby("layer").a2.sum() == TOP_K * counts.anchor.tokens).all()
    assert len(frame) == NUM_LAYERS * 8


@pytest.mark.parametrize("tokens", ["prompt", "response", "both"])
def test_batching_and_padding_do_not_change_the_counts(tokens: str) -> None:
    backbone = Backbone.of(tiny_model()).check()
    one = count_activations(backbone, tiny_chat(), PAIRS, tokens, batch_size=1)
    all_ = count_activations(backbone, tiny_chat(), PAIRS, tokens, batch_size=5)
    assert (one.adversarial.hits_PLE == all_.adversarial.hits_PLE).all()
    assert (one.anchor.hits_PLE == all_.anchor.hits_PLE).all()
    np.testing.assert_allclose(one.adversarial.mass_PLE, all_.adversarial.mass_PLE, rtol=1e-5)


def test_counting_padding_too_would_change_the_counts() -> None:
    """The planted fault: a span that covers padding must not go unnoticed."""
    model = tiny_model()
    backbone = Backbone.of(model).check()
    turns = [tiny_chat().encode(p.goal.conversation, p.anchor_reply) for p in PAIRS]
    batch = pad(turns, 0)
    with record(backbone) as trace:
        model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS)
    ones = torch.ones_like(trace.weights_TK[0])
    right = per_sequence(trace.index_TK[0], ones, batch.span("both"), 8)
    faulty = per_sequence(trace.index_TK[0], ones, torch.ones_like(batch.span("both")), 8)
    lengths = torch.tensor([len(t.ids) for t in turns])
    assert (right.sum(1) == TOP_K * lengths).all()
    assert not (faulty.sum(1) == TOP_K * lengths).all()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_per_sequence_equals_counting_one_token_at_a_time(sequences: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(sequences * length)])
    value_TK = torch.rand(sequences * length, 2, generator=generator)
    span_BS = torch.rand(sequences, length, generator=generator) < 0.5
    expected = torch.zeros(sequences, 5, dtype=torch.float64)
    for token in range(sequences * length):
        if span_BS.reshape(-1)[token]:
            for slot in range(2):
                expected[token // length, index_TK[token, slot]] += value_TK[token, slot].double()
    torch.testing.assert_close(per_sequence(index_TK, value_TK, span_BS, 5), expected)


def test_spans_split_a_turn_into_prompt_and_response() -> None:
    turn = tiny_chat().encode(Conversation.of("w1 w2"), Reply.written("w3"))
    batch = pad([turn, tiny_chat().encode(Conversation.of("w1"), Reply.written("w3 w4 w5"))], 0)
    assert turn.prompt == 4  # <user> w1 w2 <assistant>
    assert batch.span("prompt").sum(1).tolist() == [4, 3]
    assert batch.span("response").sum(1).tolist() == [2, 4]  # with <eos>
    assert (batch.span("both") == batch.attention_mask_BS.bool()).all()


def test_a_template_that_rewrites_the_assistant_turn_still_gives_the_right_spans() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("%}<assistant> {% endif", "%}<assistant> w9 {% endif")
    turn = Chat(tokenizer).encode(Conversation.of("w1"), Reply.written("w3"))
    assert tokenizer.decode(turn.ids) == "<user> w1 <assistant> w9 w3 <eos>"
    assert turn.prompt == 4


@pytest.mark.parametrize("kind", ["aad", "risk_difference", "gate_mass"])
@pytest.mark.parametrize("pool", ["token", "pair"])
def test_scores_of_equal_sides_are_zero(kind: str, pool: str) -> None:
    backbone = Backbone.of(tiny_model()).check()
    same = [Pair(p.goal, Wrapper("w:0", "w", "seen", "[X]", "[X]"), p.anchor_reply, p.anchor_reply) for p in PAIRS]
    counts = count_activations(backbone, tiny_chat(), same, "both", 3)
    np.testing.assert_allclose(score(counts, kind, pool), 0.0, atol=1e-12)


def test_risk_difference_sums_to_zero_in_every_layer() -> None:
    counts = count_activations(Backbone.of(tiny_model()).check(), tiny_chat(), PAIRS, "both", 3)
    np.testing.assert_allclose(score(counts, "risk_difference", "token").sum(1), 0.0, atol=1e-12)


def test_aad_weighs_pairs_and_risk_difference_weighs_tokens() -> None:
    counts = count_activations(Backbone.of(tiny_model()).check(), tiny_chat(), PAIRS, "response", 3)
    by_hand = (counts.adversarial.hits_PLE / counts.adversarial.tokens_P[:, None, None]).mean(0) - (
        counts.anchor.hits_PLE / counts.anchor.tokens_P[:, None, None]
    ).mean(0)
    np.testing.assert_allclose(score(counts, "aad", "token"), by_hand)
    frame = counts.frame()
    rd = frame.a1 / (frame.a1 + frame.d1) - frame.a2 / (frame.a2 + frame.d2)
    np.testing.assert_allclose(score(counts, "risk_difference", "token").ravel(), rd)
    active = (counts.adversarial.hits_PLE > 0).mean(0) - (counts.anchor.hits_PLE > 0).mean(0)
    np.testing.assert_allclose(score(counts, "aad", "pair"), active)


def test_stability_is_a_share_per_expert_that_sums_to_k() -> None:
    counts = count_activations(Backbone.of(tiny_model()).check(), tiny_chat(), PAIRS, "both", 3)

    def found(seed: int) -> np.ndarray:
        return stability(
            lambda rows: score(counts.take(rows), "aad", "token"), len(counts), counts.experts, 4, 2, 20, seed
        )

    assert found(0).min() >= 0 and found(0).max() <= 1
    assert found(0).sum() == pytest.approx(4)
    assert (found(0) == found(0)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_squared_gradient_of_the_refusal_after_the_jailbreak(family: str) -> None:
    model = tiny_model(family)
    backbone = Backbone.of(model).check()
    found, shared = gradient_saliency(backbone, tiny_chat(), PAIRS, batch_size=5)
    assert found.shape == (1, NUM_LAYERS, 8) and not shared.any()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    down = model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
    losses = []
    for pair in PAIRS:
        turn = tiny_chat().encode(pair.adversarial_prompt, pair.anchor_reply)
        ids = torch.tensor([turn.ids])
        losses.append(
            torch.nn.functional.cross_entropy(model(ids).logits[0, turn.prompt - 1 : -1], ids[0, turn.prompt :])
        )
    torch.stack(losses).mean().backward()
    assert down.grad is not None
    down_only = down.grad.double().flatten(1).square().sum(1).numpy()
    assert (found[0, 1] >= down_only * 0.999).all()
    assert (found[0, 1] > 0).any()


def test_saliency_sees_the_shared_experts_that_counts_cannot() -> None:
    model = next(f for f in MOE_FAMILIES if f.model_type == "deepseek_v2").build()
    backbone = Backbone.of(model).check()
    _, shared_ML = gradient_saliency(backbone, tiny_chat(), PAIRS, batch_size=5)
    shared = backbone.layers[1].shared
    assert shared is not None and shared_ML.shape == (1, 2)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    shared.requires_grad_(True)
    batch = pad([tiny_chat().encode(p.adversarial_prompt, p.anchor_reply) for p in PAIRS], 0)
    refusal_loss(backbone, batch).backward()
    expected = sum(p.grad.double().square().sum().item() for p in shared.parameters() if p.grad is not None)
    assert shared_ML[0, 1] == pytest.approx(expected, rel=1e-5) and expected > 0
