"""Faults put into training on purpose: each is caught by a check that a run itself makes, not by a test alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from data_prep.schema import Conversation
from tests.moe.families import FAMILIES
from tests.training import test_consistency, test_repair
from tests.training.test_repair import split
from trainer.model.chat import Chat, ChatTurn
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import CriticalExperts, SplitModel
from trainer.training import consistency, repair, responses
from trainer.training.consistency import RoutingConsistencyTrainer
from trainer.training.repair import TrainingRow

Patch = pytest.MonkeyPatch


def repaired(folder: Path, trained: SplitModel | None = None, rows: list[TrainingRow] = test_repair.ROWS) -> Any:
    return test_repair.train(trained or split(), folder, rows, arguments={"max_steps": 1})


def made_consistent(folder: Path, trained: SplitModel | None = None, **keys: Any) -> Any:
    return test_consistency.train(trained or split(), folder, {"max_steps": 1}, **keys)


def test_without_a_fault_the_checks_are_silent(tmp_path: Path) -> None:
    repaired(tmp_path)
    made_consistent(tmp_path)


# --- the loss --------------------------------------------------------------------------------------


def unmasked(batch: Any) -> Any:
    response_BS = batch.response_BS | ~batch.attention_mask_BS.bool()
    return type(batch)(batch.input_ids_BS, batch.attention_mask_BS, batch.prompt_BS, response_BS)


@pytest.mark.parametrize("stage", [responses, consistency])
def test_padding_that_counts(stage: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    pad = stage.pad
    monkeypatch.setattr(stage, "pad", lambda turns, padding: unmasked(pad(turns, padding)))
    monkeypatch.setattr(test_consistency, "ROWS", RAGGED)
    rows = [test_repair.row("w1 " * (1 + i % 3), "w50 " * (1 + i % 5)) for i in range(8)]
    with pytest.raises(RuntimeError, match="the loss of the first batch is"):
        repaired(tmp_path, rows=rows) if stage is responses else made_consistent(tmp_path)


def test_padding_that_counts_in_the_benign_stream(tmp_path: Path, monkeypatch: Patch) -> None:
    trained = split()
    with torch.no_grad():  # the benign term is 0 until something moved
        trained.load_state_dict({n: t + 0.3 * torch.randn_like(t) for n, t in trained.state_dict().items()})
    benign = RoutingConsistencyTrainer._benign_loss

    def over_padding(self: Any, original: Any, current: Any, batch: Any) -> Any:
        everything = torch.ones_like(batch.attention_mask_BS)
        return benign(self, original, current, type(batch)(batch.input_ids_BS, everything, *[batch.prompt_BS] * 2))

    monkeypatch.setattr(RoutingConsistencyTrainer, "_benign_loss", over_padding)
    monkeypatch.setattr(test_consistency, "ROWS", RAGGED)
    with pytest.raises(RuntimeError, match="consistency: the loss of the first batch is"):
        made_consistent(tmp_path, trained)


RAGGED = [
    consistency.ConsistencyRow(
        Conversation.of(f"w{i}"),
        Conversation.of(f"w40 w{i} w42"),
        Reply.written("w50 " * (1 + i % 4)),
        Conversation.of(" ".join(f"w{j}" for j in range(1 + 5 * (i % 2)))),
        Reply.written("w3"),
    )
    for i in range(8)
]


def test_prompt_tokens_that_are_trained(tmp_path: Path, monkeypatch: Patch) -> None:
    pad = responses.pad
    monkeypatch.setattr(
        responses, "pad", lambda turns, padding: pad([ChatTurn(t.ids, max(t.prompt - 1, 1)) for t in turns], padding)
    )
    with pytest.raises(RuntimeError, match="repair: the loss of the first batch is"):
        repaired(tmp_path)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_divergence_on_the_wrong_side(direction: str, tmp_path: Path, monkeypatch: Patch) -> None:
    right = consistency.divergence

    def swapped(target: torch.Tensor, current: torch.Tensor, way: Any) -> torch.Tensor:
        return right(target, current, {"forward": "reverse", "reverse": "forward"}[way])

    monkeypatch.setattr(consistency, "divergence", swapped)
    with pytest.raises(RuntimeError, match="consistency: the loss of the first batch is"):
        made_consistent(tmp_path, direction=direction)


def test_a_gradient_on_the_anchors_side(tmp_path: Path, monkeypatch: Patch) -> None:
    route = RoutingConsistencyTrainer._route
    monkeypatch.setattr(
        RoutingConsistencyTrainer,
        "_route",
        lambda self, model, batch, *, original, grad: route(self, model, batch, original=original, grad=not original),
    )
    with pytest.raises(RuntimeError, match="the anchor's routing carries a gradient"):
        made_consistent(tmp_path)


def test_a_retain_term_with_the_wrong_sign_of_its_sides(tmp_path: Path, monkeypatch: Patch) -> None:
    def reverse(self: Any, model: Any, inputs: Any, logits_NV: torch.Tensor, _kept_N: Any) -> torch.Tensor:
        original = self._on_responses(model, inputs, inputs["retain"]).logits.log_softmax(-1)
        now = logits_NV.log_softmax(-1)
        return (now.exp() * (now - original)).sum(-1)

    trained = split()
    trained.load_state_dict({n: t + 0.3 * torch.randn_like(t) for n, t in trained.state_dict().items()})
    monkeypatch.setattr(repair.ExpertRepairTrainer, "_kl", reverse)
    retain = [row for row in test_repair.ROWS if row.stream == "retain"]
    with pytest.raises(RuntimeError, match="repair: the loss of the first batch is"):
        repaired(tmp_path, trained, retain)


# --- what trains -----------------------------------------------------------------------------------


def test_nothing_trained(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"repair: none of the 6 tensors that train moved in 6 steps; raise repair\.le"
    ):
        test_repair.train(split(), tmp_path, arguments={"learning_rate": 0.0})
    with pytest.raises(UserError, match=r"consistency: none of the 3 tensors that train moved in 6 steps"):
        test_consistency.train(split(), tmp_path, {"learning_rate": 0.0})


def test_an_optimiser_that_steps_other_tensors(tmp_path: Path, monkeypatch: Patch) -> None:
    create = repair.ExpertRepairTrainer.create_optimizer

    def of_copies(self: Any, *given: Any) -> Any:
        optimiser = create(self, *given)
        for group in optimiser.param_groups:
            group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        return optimiser

    monkeypatch.setattr(repair.ExpertRepairTrainer, "create_optimizer", of_copies)
    with pytest.raises(UserError, match="none of the 6 tensors that train moved"):
        repaired(tmp_path)


def test_an_expert_index_shifted_by_one(tmp_path: Path, monkeypatch: Patch) -> None:
    """The copy that trains starts from its neighbour."""
    made = CriticalExperts.__init__

    def shifted(self: CriticalExperts, fused: Any, indices: list[int]) -> None:
        made(self, fused, indices)
        other = CriticalExperts.__new__(CriticalExperts)
        made(other, fused, [index + 1 for index in indices])
        for mine, neighbour in zip(self.parameters(), other.parameters(), strict=True):
            mine.data.copy_(neighbour.data)

    monkeypatch.setattr(CriticalExperts, "__init__", shifted)
    with pytest.raises(RuntimeError, match="before the first update, against the original model"):
        repaired(tmp_path)


# --- chance ----------------------------------------------------------------------------------------


def of_family(model_type: str) -> SplitModel:
    family = next(family for family in FAMILIES if family.model_type == model_type)
    model = family.build()
    for module in model.modules():  # mixtral's jitter is off by default
        if getattr(module, "jitter_noise", None) is not None:
            module.jitter_noise = 0.3
    backbone = Backbone.of(model).check()
    sizes = {layer.index: layer.num_experts for layer in backbone}
    return SplitModel(backbone, ExpertSet(tuple(Member(1, expert) for expert in range(6)), sizes))


@pytest.mark.parametrize("stage", [repair, consistency])
@pytest.mark.parametrize("model_type", ["phimoe", "mixtral"])
def test_routers_that_draw(model_type: str, stage: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    run: Callable[..., Any] = repaired if stage is repair else made_consistent
    result = run(tmp_path, of_family(model_type))
    assert result.log[0].get("topk_flip_rate", 0.0) == 0.0
    monkeypatch.setattr(stage, "draw_nothing", lambda model: None)
    with pytest.raises(RuntimeError, match=r"layer \d routes otherwise while it trains than in evaluation"):
        run(tmp_path, of_family(model_type))


def test_an_original_that_is_none(tmp_path: Path) -> None:
    trained = split()
    with torch.no_grad():
        for parameter in trained.backbone.router_parameters().values():
            parameter += 0.3 * torch.randn_like(parameter)
    with pytest.raises(RuntimeError, match=r"other choices than the original before the first|against the original"):
        repaired(tmp_path, trained)


# --- the rows --------------------------------------------------------------------------------------


def written(
    prompt: str, ids: tuple[int, ...], finished: bool, stream: Any = "retain", source: str = "x"
) -> TrainingRow:
    return TrainingRow(Conversation.of(prompt), Reply("w30", ids, finished), stream, source)


def test_an_end_token_behind_a_cut_reply(tmp_path: Path, monkeypatch: Patch) -> None:
    rows = [written("w1 w2", (30, 31, 32), False) for _ in range(4)]
    assert repaired(tmp_path, rows=[*rows, *test_repair.ROWS]).rows["x"]["unfinished"] == 4
    encode = Chat.encode

    def closing(self: Chat, prompt: Conversation, reply: Reply) -> ChatTurn:
        turn = encode(self, prompt, reply)
        return ChatTurn([*turn.ids, 1], turn.prompt)

    monkeypatch.setattr(Chat, "encode", closing)
    with pytest.raises(RuntimeError, match="a response of 4 tokens would be trained where the model wrote 3 others"):
        repaired(tmp_path, rows=rows)


def test_a_kind_of_rows_that_is_gone(tmp_path: Path) -> None:
    long = [test_repair.row("w1 " * 40, "w30", "retain", "wrapped benign") for _ in range(3)]
    said = r"repair: none of 5 rows 'wrapped benign' is left \(3 prompt as long as max_length, 2 answered with a "
    with pytest.raises(UserError, match=said + r"refusal\); raise repair.max_length; give other data"):
        repair.repair_experts(
            split(),
            test_repair.tiny_chat(),
            [*test_repair.ROWS, *long],
            test_repair.RepairSection(**test_repair.FAST, max_length=20),
            tmp_path,
            0,
            left_out={("wrapped benign", "answered with a refusal"): 2},
        )


def test_a_trainer_that_drops_rows_itself(tmp_path: Path, monkeypatch: Patch) -> None:
    made = repair.SFTTrainer.__init__

    def dropping(self: Any, *args: Any, **keys: Any) -> None:
        made(self, *args, **keys)
        self.train_dataset = self.train_dataset.select(range(3))

    monkeypatch.setattr(repair.SFTTrainer, "__init__", dropping)
    with pytest.raises(RuntimeError, match="repair: the trainer holds 3 rows, and not the 16 it was given"):
        repaired(tmp_path)
