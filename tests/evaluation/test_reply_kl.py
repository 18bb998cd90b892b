"""KL on replies: 0 without an edit, what an independent computation gives with one, and only on the reply."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from data_prep.schema import Conversation
from tests.tiny import tiny_chat, tiny_model
from trainer.evaluation.reply_kl import reply_kl
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone

CHAT = tiny_chat()
TURNS = [
    CHAT.encode(Conversation.of(asked), Reply.written(said))
    for asked, said in (("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9"), ("w1 w1", "w2 w3"))
]


def test_kl_is_that_of_every_reply_token_turns_weighing_the_same() -> None:
    backbone = Backbone.of(tiny_model("mixtral"))
    head = backbone.model.get_output_embeddings().weight

    @contextlib.contextmanager
    def edited() -> Iterator[None]:
        with torch.no_grad():
            former = head.clone()
            head.mul_(1.5)
            try:
                yield
            finally:
                head.copy_(former)

    assert reply_kl(backbone, CHAT, TURNS, contextlib.nullcontext, 2) == 0
    means = []
    for turn in TURNS:
        ids = torch.tensor([turn.ids])
        with torch.no_grad():
            before = backbone.model(input_ids=ids).logits[0].log_softmax(-1)
            with edited():
                after = backbone.model(input_ids=ids).logits[0].log_softmax(-1)
        predicting = slice(turn.prompt - 1, len(turn.ids) - 1)
        kl = torch.nn.functional.kl_div(after[predicting], before[predicting], log_target=True, reduction="none").sum(
            -1
        )
        means.append(kl.mean().item())
    wanted = sum(means) / len(means)
    assert wanted > 0
    for batch_size in (1, 2, 8):
        assert reply_kl(backbone, CHAT, TURNS, edited, batch_size) == pytest.approx(wanted, rel=1e-4)
