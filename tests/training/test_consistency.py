"""The routing-consistency stage on a tiny model: only routers move, masked and per pair."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_prep.schema import Conversation
from tests.tiny import FAMILIES, tiny_chat, token_ids
from tests.training.test_repair import split
from trainer.model.chat import pad
from trainer.model.reply import Reply
from trainer.moe.routing import record
from trainer.recipe.sections import ConsistencySection
from trainer.training.consistency import (
    ConsistencyRow,
    RoutingConsistencyTrainer,
    divergence,
    make_routing_consistent,
)
from trainer.training.loop import StageResult

REFUSAL, ANSWER = Reply.written("w50 w51 w52"), Reply.written("w30 w31 w32 w33")
ROWS = [
    ConsistencyRow(
        Conversation.of(f"w{i}"),
        Conversation.of(f"w40 w41 w{i} w42"),
        REFUSAL,
        Conversation.of(f"w{i + 20} w3"),
        ANSWER,
    )
    for i in range(8)
]
FAST = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}


def train(trained: Any, folder: Path, arguments: dict[str, Any] | None = None, **keys: Any) -> StageResult:
    """The stage with keys of the recipe's section, the trainer's own in `arguments`."""
    section = ConsistencySection(**FAST | (arguments or {}), **keys)
    return make_routing_consistent(trained, tiny_chat(), ROWS, section, folder, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_routers_move(family: str, tmp_path: Path) -> None:
    trained = split(family)
    before = {name: t.clone() for name, t in trained.model.state_dict().items()}
    train(trained, tmp_path)
    changed = {name for name, t in trained.model.state_dict().items() if not torch.equal(before[name], t)}
    assert changed == set(trained.backbone.router_parameters())


@pytest.mark.parametrize("position", ["last_prompt", "response_mean", "response_tokens"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("target", ["current", "original"])
def test_the_divergence_falls(position: str, direction: str, target: str, tmp_path: Path) -> None:
    result = train(
        split(), tmp_path, {"max_steps": 25}, position=position, direction=direction, target=target, benign_weight=0.0
    )
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    assert losses[0] > 0
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_loss_is_the_masked_per_pair_mean_done_by_hand(tmp_path: Path) -> None:
    trained = split()
    by_hand = []
    for row in ROWS:
        traces = []
        for prompt in (row.anchor_prompt, row.adversarial_prompt):
            turn = tiny_chat().encode(prompt, row.refusal)
            with torch.no_grad(), record(trained.backbone) as trace:
                trained.model(torch.tensor([turn.ids]))
            traces.append({i: t[turn.prompt :].log_softmax(-1) for i, t in trace.logits_TE.items()})
        anchor, adversarial = traces
        layers = [(anchor[i].exp() * (anchor[i] - adversarial[i])).sum(-1).mean() for i in anchor]
        by_hand.append(torch.stack(layers).mean().item())
    one_step = {"max_steps": 1, "per_device_train_batch_size": 8}
    result = train(trained, tmp_path, one_step, benign_weight=0.0)
    assert result.log[0]["loss"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_the_benign_stream_holds_harmless_routing_in_place(tmp_path: Path) -> None:
    def drift(weight: float) -> float:
        trained = split()
        train(trained, tmp_path, {"max_steps": 25}, benign_weight=weight)
        batch = pad([tiny_chat().encode(row.benign_prompt, row.benign_reply) for row in ROWS], 0)
        with torch.no_grad(), record(trained.backbone) as now:
            trained.model(batch.input_ids_BS, attention_mask=batch.attention_mask_BS)
        with trained.original() as original, record(original) as before:
            trained.model(batch.input_ids_BS, attention_mask=batch.attention_mask_BS)
        return sum(
            divergence(before.logits_TE[i].log_softmax(-1), now.logits_TE[i].log_softmax(-1), "forward").mean().item()
            for i in now.logits_TE
        )

    assert drift(20.0) < 0.5 * drift(0.0)


def test_temperature_sharpens_the_compared_distributions(tmp_path: Path) -> None:
    one_step = {"max_steps": 1}
    cold = train(split(), tmp_path, one_step, temperature=0.1, benign_weight=0.0).log[0]["loss"]
    warm = train(split(), tmp_path, one_step, temperature=1.0, benign_weight=0.0).log[0]["loss"]
    assert cold > warm


def test_updates_too_small_for_bf16_still_accumulate_in_fp32_masters() -> None:
    trained = split(dtype=torch.bfloat16)
    weight = next(iter(trained.backbone.router_parameters().values()))
    assert weight.dtype == torch.float32
    start = weight.detach().clone()
    for _ in range(2000):
        weight.data += 1e-6 * start.sign().where(start != 0, torch.ones_like(start))
    assert not torch.equal(weight.bfloat16(), start.bfloat16())
    trained.fuse()
    assert {p.dtype for p in trained.backbone.router_parameters().values()} == {torch.bfloat16}
    lost = start.bfloat16()
    for _ in range(2000):
        lost += 1e-6
    assert (lost == start.bfloat16()).float().mean() > 0.9, "what happens without masters"


def test_a_16_bit_router_computes_with_what_will_be_exported() -> None:
    """A router in fp32 would choose other experts in training than the exported 16-bit one."""
    trained = split(dtype=torch.bfloat16)
    for parameter in trained.backbone.router_parameters().values():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = trained.model(token_ids()).logits
        trained.fuse()
        assert torch.equal(trained.model(token_ids()).logits, expected)


def test_the_original_router_is_back_inside_and_gone_outside() -> None:
    trained = split(dtype=torch.bfloat16)
    with torch.no_grad():
        before = trained.model(token_ids()).logits
        for parameter in trained.backbone.router_parameters().values():
            parameter.data += torch.randn_like(parameter)
        moved = trained.model(token_ids()).logits
        with trained.original():
            assert torch.equal(trained.model(token_ids()).logits, before)
        assert torch.equal(trained.model(token_ids()).logits, moved)
    assert not torch.equal(before, moved)


def test_a_bf16_model_trains_its_routers(tmp_path: Path) -> None:
    trained = split(dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in trained.backbone.router_parameters().items()}
    train(trained, tmp_path)
    assert any(not torch.equal(before[n], p) for n, p in trained.backbone.router_parameters().items())


def test_reentrant_checkpointing_is_never_used(tmp_path: Path) -> None:
    """The planted fault: captured router logits carry no gradient under reentrant checkpointing."""
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValidationError, match="routing captured under it carries no gradient"):
        ConsistencySection(**arguments)
    unchecked = ConsistencySection(**FAST).model_copy(update=arguments)
    plain, checkpointed = split(), split()
    train(plain, tmp_path)
    make_routing_consistent(checkpointed, tiny_chat(), ROWS, unchecked, tmp_path, 0)
    for name, value in plain.backbone.router_parameters().items():
        torch.testing.assert_close(checkpointed.backbone.router_parameters()[name], value, atol=1e-5, rtol=1e-4)


def test_logits_without_a_gradient_stop_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route = RoutingConsistencyTrainer._route

    def detached(self: Any, model: Any, batch: Any, *, original: bool, grad: bool) -> Any:
        return route(self, model, batch, original=original, grad=False)

    monkeypatch.setattr(RoutingConsistencyTrainer, "_route", detached)
    with pytest.raises(AssertionError, match="no recorded router logit carries a gradient"):
        train(split(), tmp_path)
