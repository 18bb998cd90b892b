"""The routing gap of pairs: what every training stage is measured by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_prep.schema import Conversation
from tests.tiny import tiny_chat
from tests.training.test_repair import split
from trainer.evaluation.diagnostics import Twins, routing_gap
from trainer.model.reply import Reply
from trainer.moe.routing import record

TWINS = [
    Twins(Conversation.of(f"w{i}"), Conversation.of(f"w40 w{i} w42"), Reply.written("w50 " * (1 + i % 3)))
    for i in range(10)
]


def test_gap_and_loss_are_those_of_every_pair_alone() -> None:
    trained, chat = split(), tiny_chat()
    gaps, losses = [], []
    for pair in TWINS:
        traces = []
        for prompt in (pair.anchor, pair.adversarial):
            turn = chat.encode(prompt, pair.refusal)
            with torch.no_grad(), record(trained.backbone) as trace:
                logits = trained.model(torch.tensor([turn.ids])).logits[0, turn.prompt - 1 : -1]
            traces.append({i: t[turn.prompt :].log_softmax(-1) for i, t in trace.logits_TE.items()})
        losses.append(F.cross_entropy(logits, torch.tensor(turn.ids[turn.prompt :])).item())
        anchor, adversarial = traces
        kl = [(anchor[i].exp() * (anchor[i] - adversarial[i])).sum(-1).mean() for i in anchor]
        gaps.append(torch.stack(kl).mean().item())
    found = routing_gap(trained, chat, TWINS)
    assert found["routing_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert found["refusal_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert 0 < found["flip_rate"] < 1


def test_a_prompt_and_itself_have_no_gap() -> None:
    same = [Twins(pair.anchor, pair.anchor, pair.refusal) for pair in TWINS]
    found = routing_gap(split(), tiny_chat(), same)
    assert found["routing_gap"] == pytest.approx(0.0, abs=1e-6) and found["flip_rate"] == 0.0
