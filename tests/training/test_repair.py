"""The expert repair stage on a tiny model: what trains, on which tokens, under which routing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.schema import Conversation
from tests.tiny import FAMILIES, tiny_chat, tiny_model
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.moe.routing import record
from trainer.moe.trainable import TrainableModel, WholeModel
from trainer.recipe.sections import RepairSection
from trainer.training import repair
from trainer.training.fitting import RowTable
from trainer.training.loop import NonFiniteLossError
from trainer.training.repair import ExpertRepairTrainer, Stream, TrainingRow, repair_experts


def row(prompt: str, reply: str, stream: Stream = "repair", source: str = "x") -> TrainingRow:
    return TrainingRow(Conversation.of(prompt), Reply.written(reply), stream, source)


ROWS = [row(f"w{i} w{i + 1} w{i + 2}", "w50 w51 w52", "repair", "jailbreak") for i in range(8)] + [
    row(f"w{i + 20}", f"w{i + 30} w{i + 31}", "retain", "plain benign") for i in range(8)
]
FAST = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2, "warmup_steps": 0}
CHOSEN = ((0, 1), (1, 2), (1, 6), (2, 0))


def split(family: str = "olmoe", **kwargs: Any) -> SplitModel:
    backbone = Backbone.of(tiny_model(family, **kwargs)).check()
    sizes = {layer.index: layer.num_experts for layer in backbone}
    return SplitModel(backbone, ExpertSet(tuple(Member(*pair) for pair in CHOSEN), sizes))


def train(trained: TrainableModel, folder: Path, rows: list[TrainingRow] = ROWS, seed: int = 0, **keys: Any) -> Any:
    """The stage with keys of the recipe's section, the trainer's own under `arguments`."""
    section = RepairSection(**{**FAST, **keys.pop("arguments", {})}, **keys)
    return repair_experts(trained, tiny_chat(), rows, section, folder, seed)


def moved(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("routing", ["frozen", "replay"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_critical_experts_moves_even_under_weight_decay(
    family: str, routing: str, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in tiny_model(family).state_dict().items()}
    trained = split(family)
    result = train(trained, tmp_path, routing=routing, arguments={"weight_decay": 0.5})
    trained.fuse()
    fused = Backbone.of(trained.model).expert_parameters()
    changed = moved(before, trained.model)
    assert changed and changed <= set(fused)
    for name in changed:
        rows = (before[name] != fused[name]).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert rows == [e for layer, e in CHOSEN if layer == int(name.split(".")[2])]
    assert result.trained_parameters < 0.2 * result.total_parameters


def test_gates_move_only_when_asked(tmp_path: Path) -> None:
    for train_gates in (False, True):
        trained = split()
        before = {n: p.detach().clone() for n, p in trained.backbone.router_parameters().items()}
        train(trained, tmp_path, train_gates=train_gates)
        after = trained.backbone.router_parameters()
        assert all(torch.equal(before[n], after[n]) is not train_gates for n in before)


def test_the_loss_is_the_response_only_row_mean_of_cross_entropy(tmp_path: Path) -> None:
    """Prompt and padding tokens add nothing; a long reply weighs as much as a short one."""
    rows = [row("w1 w2 w3 w4", "w50"), row("w5", "w51 w52 w53 w54 w55")]
    model = tiny_model()
    by_hand = []
    for given in rows:
        turn = tiny_chat().encode(given.prompt, given.reply)
        ids = torch.tensor([turn.ids])
        logits = model(ids).logits[0, turn.prompt - 1 : -1]
        by_hand.append(F.cross_entropy(logits, ids[0, turn.prompt :]).item())
    result = train(split(), tmp_path, rows, arguments={"max_steps": 1, "logging_steps": 1})
    assert result.log[0]["loss"] == pytest.approx(sum(by_hand) / 2, rel=1e-4)


def test_the_retain_term_is_zero_before_training_and_its_weight_counts(tmp_path: Path) -> None:
    retain = [given for given in ROWS if given.stream == "retain"]
    one_step = {"max_steps": 1, "logging_steps": 1}
    assert train(split(), tmp_path, retain, arguments=one_step).log[0]["loss"] == pytest.approx(0.0, abs=1e-5)
    cross_entropy = train(split(), tmp_path, retain, retain_loss="ce", arguments=one_step).log[0]["loss"]
    doubled = train(split(), tmp_path, retain, retain_loss="ce", retain_weight=2.0, arguments=one_step).log[0]["loss"]
    assert cross_entropy > 0.1
    assert doubled == pytest.approx(2 * cross_entropy, rel=1e-4)


def test_retaining_keeps_the_model_closer_to_the_original(tmp_path: Path) -> None:
    def drift(weight: float) -> float:
        trained = split()
        train(trained, tmp_path, retain_weight=weight, arguments={"max_steps": 30})
        ids = torch.tensor([tiny_chat().encode(Conversation.of("w20"), Reply.written("w30 w31")).ids])
        with trained.original() as original:
            reference = original.model(ids).logits.log_softmax(-1)
        return (reference.exp() * (reference - trained.model(ids).logits.log_softmax(-1))).sum().item()

    assert drift(5.0) < 0.5 * drift(0.0)


def test_the_first_token_weight_adds_the_loss_of_the_first_response_token(tmp_path: Path) -> None:
    rows = [row("w1 w2", "w50 w51 w52")] * 2
    turn = tiny_chat().encode(Conversation.of("w1 w2"), rows[0].reply)
    logits = tiny_model()(torch.tensor([turn.ids])).logits[0, turn.prompt - 1]
    first = F.cross_entropy(logits[None], torch.tensor([turn.ids[turn.prompt]])).item()
    one_step = {"max_steps": 1, "logging_steps": 1}
    plain = train(split(), tmp_path, rows, arguments=one_step).log[0]["loss"]
    weighted = train(split(), tmp_path, rows, first_token_weight=0.5, arguments=one_step).log[0]["loss"]
    assert weighted - plain == pytest.approx(0.5 * first, rel=1e-3)


def test_replay_runs_the_original_models_experts_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = split()
    trained.load_state_dict({n: t + 0.3 * torch.randn_like(t) for n, t in trained.state_dict().items()})
    seen: list[bool] = []
    compute = ExpertRepairTrainer.compute_loss

    def spying(self: ExpertRepairTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        called: dict[int, torch.Tensor] = {}

        def keep(layer: int, args: tuple[torch.Tensor, ...]) -> None:
            called.setdefault(layer, args[1].clone())

        hooks = [
            layer.experts.register_forward_pre_hook(lambda _m, args, i=layer.index: keep(i, args))
            for layer in trained.backbone
        ]
        loss = compute(self, model, inputs, *rest, **kwargs)
        for hook in hooks:
            hook.remove()
        assert self._replayed is not None
        seen.append(all(torch.equal(called[i], self._replayed.routing.index_TK[i]) for i in called))
        return loss

    monkeypatch.setattr(ExpertRepairTrainer, "compute_loss", spying)
    result = train(trained, tmp_path, routing="replay")
    assert seen and all(seen)
    assert any(entry.get("topk_flip_rate", 0) > 0 for entry in result.log), "the routers would have chosen otherwise"


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = split(), split()
    train(plain, tmp_path, routing="replay")
    train(checkpointed, tmp_path, routing="replay", arguments={"gradient_checkpointing": True})
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    one, accumulated = split(), split()
    train(one, tmp_path, arguments={"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 1.0})
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0}
    train(accumulated, tmp_path, arguments=halves)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(accumulated.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_the_load_balancing_loss_is_off_and_the_config_comes_back_unchanged(tmp_path: Path) -> None:
    trained = split()
    config = trained.model.config
    assert config.router_aux_loss_coef > 0, "on by default: the trap"
    before, generation = config.to_dict(), trained.model.generation_config.to_dict()
    result = train(trained, tmp_path)
    assert config.to_dict() == before
    assert trained.model.generation_config.to_dict() == generation
    assert not any("aux_loss" in entry for entry in result.log)
    assert "forward" not in trained.model.__dict__, "TRL's fused LM head is taken off"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_weights_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = split()
    losses = ExpertRepairTrainer._losses
    before_step: dict[str, torch.Tensor] = {}

    def diverging(self: ExpertRepairTrainer, *args: Any) -> Any:
        rows, loss = losses(self, *args)
        if self.state.global_step == 3:
            before_step.update(trained.state_dict())
            loss = loss * float("nan")
        return rows, loss

    monkeypatch.setattr(ExpertRepairTrainer, "_losses", diverging)
    with pytest.raises(NonFiniteLossError, match=r"repair: loss is nan at step 4; stopped.*last_good.safetensors"):
        train(trained, tmp_path)
    kept = load_file(tmp_path / "last_good.safetensors")
    assert kept.keys() == before_step.keys()
    assert all(torch.equal(kept[name], before_step[name]) for name in kept)


def test_prompts_longer_than_max_length_are_refused_when_none_fits(tmp_path: Path) -> None:
    said = r"repair: none of 8 rows 'jailbreak' is left \(8 prompt as long as max_length\); raise repair\.max_length"
    with pytest.raises(UserError, match=said):
        train(split(), tmp_path, arguments={"max_length": 3})


def test_rows_that_max_length_cuts_are_counted_and_a_cut_refusal_is_no_target(tmp_path: Path) -> None:
    long = [row("w1", "w50 " * 7, "repair", "jailbreak"), row("w1", "w30 " * 8, "retain", "plain benign")]
    rows = train(split(), tmp_path, [*ROWS, *long], arguments={"max_length": 9, "max_steps": 1}).rows
    none = {"unfinished": 0}
    assert rows["jailbreak"] == none | {"kept": 8, "cut": 0, "dropped": {"refusal cut by max_length": 1}}
    assert rows["plain benign"] == none | {"kept": 9, "cut": 1, "dropped": {}}
    kept = repair._dataset(tiny_chat(), [*ROWS, *long], 9, RowTable("repair"))
    assert len(kept) == 17 and max(map(len, kept["input_ids"])) == 9
    assert kept[16]["input_ids"][-1] != tiny_chat().tokenizer.eos_token_id, "what is cut trains no end"


def test_full_fine_tuning_trains_everything_and_still_knows_the_original(tmp_path: Path) -> None:
    expected = tiny_model()(torch.tensor([[5, 6, 7]])).logits
    whole = WholeModel(Backbone.of(tiny_model()).check())
    before = {name: t.clone() for name, t in whole.model.state_dict().items()}
    train(whole, tmp_path, arguments={"max_steps": 3})
    assert moved(before, whole.model) == set(dict(whole.model.named_parameters()))
    with whole.original() as original:
        assert torch.equal(original.model(torch.tensor([[5, 6, 7]])).logits, expected)


def test_full_fine_tuning_of_a_16_bit_model_moves_as_many_weights_as_in_fp32(tmp_path: Path) -> None:
    """Small updates are lost in 16-bit weights, so a baseline that held them would be handicapped."""
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        whole = WholeModel(Backbone.of(tiny_model(dtype=dtype)).check())
        before = whole.state_dict()
        train(whole, tmp_path, arguments={"learning_rate": 5e-5})
        changed = [(before[name] != t).float().mean().item() * t.numel() for name, t in whole.state_dict().items()]
        shares.append(sum(changed) / sum(t.numel() for t in before.values()))
        whole.fuse()
        assert {p.dtype for p in whole.model.parameters()} == {dtype}
    assert shares[0] > 0.5
    assert shares[1] == pytest.approx(shares[0], rel=0.05)


def test_two_runs_with_one_seed_end_in_the_same_bits(tmp_path: Path) -> None:
    first, second = split(), split()
    train(first, tmp_path, seed=3)
    train(second, tmp_path, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_no_hook_stays_on_the_model(tmp_path: Path) -> None:
    trained = split()
    train(trained, tmp_path, routing="replay")
    assert not any(layer.router._forward_hooks for layer in trained.backbone)
    with record(trained.backbone) as trace:
        trained.model(torch.tensor([[5, 6]]))
    assert len(trace.index_TK) == 3
