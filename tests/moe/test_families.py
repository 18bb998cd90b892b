"""Every MoE family, from a tiny random model of the real class: found, recorded, pinned, split, repaired, reloaded.

What passes is written down (`backbone_table`), and the last test holds the table in the documentation against it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from data_prep.schema import Conversation
from tests.moe import backbone_table
from tests.moe.families import FAMILIES, LLAMA4, NUM_EXPERTS, TOP_K, Family, llama4
from tests.tiny import tiny_chat, tiny_tokenizer, token_ids
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.experts import SplitModel
from trainer.moe.footprint import Footprint
from trainer.moe.routing import pin, record
from trainer.recipe.sections import ConsistencySection, RepairSection
from trainer.release.audit import audit_files, reload_check
from trainer.release.export import save_checkpoint
from trainer.training.consistency import ConsistencyRow, make_routing_consistent
from trainer.training.repair import TrainingRow, repair_experts

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)

REFUSAL, ANSWER = Reply.written("w50 w51 w52"), Reply.written("w30 w31 w32 w33")
said, wrote = Conversation.of, Reply.written
REPAIR_ROWS = [
    *(TrainingRow(said(f"w{i} w{i + 1} w{i + 2}"), REFUSAL, "repair", "jailbreak") for i in range(8)),
    *(TrainingRow(said(f"w{i + 20}"), wrote(f"w{i + 30} w{i + 31}"), "retain", "plain benign") for i in range(8)),
]
CONSISTENCY_ROWS = [
    ConsistencyRow(said(f"w{i}"), said(f"w40 w41 w{i} w42"), REFUSAL, said(f"w{i + 20} w3"), ANSWER) for i in range(8)
]
ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.5,  # it would reach whatever is not frozen
    "logging_steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads only wait for each other on models of this size; the other Python uses one too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def found() -> Iterator[dict[str, dict[str, Any]]]:
    """Results by model type; written to a file at the end, for the table in the documentation."""
    results: dict[str, dict[str, Any]] = {}
    yield results
    path = backbone_table.results_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


@pytest.fixture
def passed(found: dict[str, dict[str, Any]], family: Family) -> Callable[..., None]:
    """Write results of the family down: `passed(check=True)`, as the last line of a test."""
    return lambda **results: found.setdefault(family.model_type, {}).update(results)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def critical_experts(backbone: Backbone) -> ExpertSet:
    """The most used expert of the first MoE layer and the two most used ones of the second, on the test's tokens."""
    with record(backbone) as trace:
        logits_of(backbone.model)
    members = []
    for layer, count in zip(backbone, (1, 2), strict=False):
        used = torch.bincount(trace.index_TK[layer.index].reshape(-1), minlength=layer.num_experts)
        members += [Member(layer.index, int(expert)) for expert in used.topk(count).indices]
    return ExpertSet(tuple(sorted(members)), {layer.index: layer.num_experts for layer in backbone})


def split(family: Family, lora_rank: int | None = None) -> SplitModel:
    backbone = Backbone.of(family.build()).check()
    return SplitModel(backbone, critical_experts(backbone), lora_rank=lora_rank)


def snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_experts(before: dict[str, torch.Tensor], model: PreTrainedModel) -> set[tuple[int, int]]:
    """(layer, expert) whose fused weights changed; asserts that no other tensor did."""
    backbone, after = Backbone.of(model), model.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert moved <= set(backbone.expert_parameters()), sorted(moved - set(backbone.expert_parameters()))
    return {
        (layer.index, int(expert))
        for layer in backbone
        for name in moved
        if name.startswith(f"{layer.experts_name}.")
        for expert in (before[name] != after[name]).flatten(1).any(1).nonzero()[:, 0]
    }


@each_family
def test_layers_shared_experts_and_the_scoring_family_are_found(family: Family, passed: Callable[..., None]) -> None:
    model = family.build()
    backbone = Backbone.of(model).check()
    assert tuple(layer.index for layer in backbone) == family.layers
    assert {(layer.num_experts, layer.top_k) for layer in backbone} == {(NUM_EXPERTS, TOP_K)}
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    shared = {names.get(id(layer.shared)) for layer in backbone}
    assert shared == {family.shared}
    scorings = [layer.scoring for layer in backbone]
    assert all(scoring is not None for scoring in scorings)
    assert {scoring.family for scoring in scorings} == {family.scoring}
    assert [scoring.scale for scoring in scorings] == pytest.approx([family.scale] * len(backbone), abs=1e-6)
    decoder_layers = model.config.get_text_config().num_hidden_layers
    passed(layers=f"{len(backbone)} of {decoder_layers}", scoring=scorings[0].family, shared=family.shared)


@each_family
def test_the_recorded_routing_is_the_one_the_experts_get(family: Family, passed: Callable[..., None]) -> None:
    backbone = Backbone.of(family.build()).check()
    called: dict[int, tuple[torch.Tensor, ...]] = {}
    for layer in backbone:
        layer.experts.register_forward_pre_hook(lambda _m, args, i=layer.index: called.__setitem__(i, args))
    with record(backbone) as trace:
        logits_of(backbone.model)
    tokens = token_ids().numel()
    for layer in backbone:
        _, index_TK, weights_TK = called[layer.index]
        assert torch.equal(trace.index_TK[layer.index], index_TK)
        assert torch.equal(trace.weights_TK[layer.index], weights_TK)
        assert trace.logits_TE[layer.index].shape == (tokens, NUM_EXPERTS)
        assert trace.index_TK[layer.index].unique().numel() > TOP_K, "the test would not see a wrong expert"
    passed(record=True)


@each_family
def test_a_pinned_model_runs_the_given_experts(family: Family, passed: Callable[..., None]) -> None:
    """Its own routing changes nothing; another model's routing is followed, in every layer and slot."""
    backbone = Backbone.of(family.build()).check()
    with record(backbone) as own:
        expected = logits_of(backbone.model)
    with pin(backbone, own.index_TK):
        assert torch.equal(logits_of(backbone.model), expected)
    if family.scoring != "sparsemixer":  # its weights depend on the order of the slots
        with pin(backbone, {i: index_TK.flip(-1) for i, index_TK in own.index_TK.items()}):
            torch.testing.assert_close(logits_of(backbone.model), expected, atol=1e-4, rtol=1e-3)

    other = Backbone.of(family.build(seed=1))
    with record(other) as theirs:
        logits_of(other.model)
    called: dict[int, torch.Tensor] = {}
    for layer in backbone:
        layer.experts.register_forward_pre_hook(lambda _m, args, i=layer.index: called.__setitem__(i, args[1]))
    with pin(backbone, theirs.index_TK):
        pinned = logits_of(backbone.model)
    assert not torch.allclose(pinned, expected, atol=1e-3)
    for index, index_TK in theirs.index_TK.items():
        assert torch.equal(called[index], index_TK)
        assert not torch.equal(called[index], own.index_TK[index])
    passed(pin=True)


@pytest.mark.parametrize("lora_rank", [None, 8], ids=["full", "LoRA"])
@each_family
def test_split_experts_train_alone_and_fuse_back(
    family: Family, lora_rank: int | None, passed: Callable[..., None]
) -> None:
    expected = logits_of(family.build())
    model = split(family, lora_rank)
    torch.testing.assert_close(logits_of(model.model), expected, atol=2e-5, rtol=1e-4)
    with model.original() as original:
        torch.testing.assert_close(logits_of(original.model), expected, atol=0, rtol=0)

    model.train_experts()
    adam = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = token_ids()
    for _ in range(2):  # the first step of LoRA moves only one of its two factors
        model.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        adam.step()
        adam.zero_grad()
    trained = logits_of(model.model)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.fuse()
    torch.testing.assert_close(logits_of(model.model), trained, atol=2e-5, rtol=1e-4)
    assert changed_experts(family.build().state_dict(), model.model) == model.expert_set.pairs
    passed(**{"full" if lora_rank is None else "LoRA": True})


@each_family
def test_a_repair_step_moves_the_critical_experts_and_nothing_else(
    family: Family, passed: Callable[..., None], tmp_path: Path
) -> None:
    model = split(family)
    before = family.build().state_dict()
    section = RepairSection(routing="replay", **ONE_STEP)
    result = repair_experts(model, tiny_chat(), REPAIR_ROWS, section, tmp_path, 0)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in result.log if "loss" in entry)
    model.fuse()
    assert changed_experts(before, model.model) == model.expert_set.pairs
    passed(repair=True)


@each_family
def test_a_consistency_step_moves_the_routers_and_nothing_else(
    family: Family, passed: Callable[..., None], tmp_path: Path
) -> None:
    model = split(family)
    before = snapshot(model.model)
    section = ConsistencySection(**ONE_STEP)
    make_routing_consistent(model, tiny_chat(), CONSISTENCY_ROWS, section, tmp_path, 0)
    after = model.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    routers = model.backbone.router_parameters()
    assert moved <= set(routers)
    assert moved >= {name for name, parameter in routers.items() if parameter.ndim == 2}, "a router did not move"
    passed(consistency=True)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.bias], ids=lambda family: family.model_type)
def test_a_16_bit_model_keeps_its_fp32_selection_biases_and_every_type(family: Family, tmp_path: Path) -> None:
    """Buffers stay fp32 beside bf16 weights, as in published checkpoints."""
    model = family.build()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = snapshot(model)
    backbone = Backbone.of(model).check()
    assert {layer.scoring.family for layer in backbone} == {family.scoring}
    trained = SplitModel(backbone, critical_experts(backbone))
    section = ConsistencySection(**ONE_STEP)
    make_routing_consistent(trained, tiny_chat(), CONSISTENCY_ROWS, section, tmp_path, 0)
    trained.fuse()
    after = model.state_dict()
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved <= set(backbone.router_parameters())


SHARED = [family for family in FAMILIES if family.shared]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", SHARED, ids=lambda family: family.model_type)
def test_the_shared_experts_of_a_set_train_and_no_others(
    family: Family, dtype: torch.dtype, tmp_path: Path, passed: Callable[..., None]
) -> None:
    """With a LoRA on the critical experts; the audit allows what the set names, and names what it does not."""
    model = family.build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    expected, before = logits_of(model), snapshot(model)
    backbone = Backbone.of(model).check()
    experts = critical_experts(backbone)
    chosen = experts.with_shared({backbone.layers[0].index})
    trained = SplitModel(backbone, chosen, lora_rank=4)
    assert {p.dtype for p in trained.trainable().values()} == {torch.float32}
    section = RepairSection(**{**ONE_STEP, "max_steps": 2})
    repair_experts(trained, tiny_chat(), REPAIR_ROWS, section, tmp_path, 0)
    repaired = logits_of(model)
    assert not torch.equal(repaired, expected)
    with trained.original() as original:
        assert torch.equal(logits_of(original.model), expected)
    stock = dict(trained.stock_state())
    trained.fuse()
    after = model.state_dict()
    assert after.keys() == before.keys() == stock.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], stock[name]) for name in after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    shared = backbone.layers[0].shared_parameters()
    assert {name for name in moved if name not in backbone.expert_parameters()} == set(shared)
    torch.testing.assert_close(logits_of(model), repaired, atol=2e-5 if dtype == torch.float32 else 5e-2, rtol=1e-4)

    save_checkpoint(model, tiny_tokenizer(), tmp_path / "repaired")
    audit = audit_files(tmp_path / "base", tmp_path / "repaired", Footprint.of_experts(backbone, chosen))
    assert (audit["untouched_identical"], audit["shared_experts_changed"]) == (True, 1), audit["moved_outside"]
    without = audit_files(tmp_path / "base", tmp_path / "repaired", Footprint.of_experts(backbone, experts))
    assert len(without["moved_outside"]) == len(shared) and without["untouched_identical"] is False
    passed(**{"shared trains": True})


class StockPython:
    """A process that knows transformers and not this project."""

    def __init__(self) -> None:
        worker = Path(__file__).with_name("reload_worker.py")
        command = [sys.executable, "-I", "-S", str(worker), sysconfig.get_path("purelib")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def logits(self, folder: Path) -> torch.Tensor:
        """The logits on the test's tokens of the checkpoint in `folder`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        save_file({"ids": token_ids()}, folder / "ids.safetensors")
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer == "ok", answer
        return load_file(folder / "logits.safetensors")["logits"]


@pytest.fixture(scope="module")
def stock_python() -> Iterator[StockPython]:
    worker = StockPython()
    yield worker
    worker.process.stdin.close()  # type: ignore[union-attr]
    worker.process.wait(timeout=60)


@each_family
def test_a_repaired_checkpoint_loads_anywhere_and_a_damaged_one_is_caught(
    family: Family, passed: Callable[..., None], tmp_path: Path, stock_python: StockPython
) -> None:
    tokenizer, here = tiny_tokenizer(), {"dtype": torch.float32, "device": torch.device("cpu")}
    save_checkpoint(family.build(), tokenizer, tmp_path / "base")
    model = split(family)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.1)
    model.fuse()
    repaired = logits_of(model.model)
    save_checkpoint(model.model, tokenizer, tmp_path / "repaired")
    assert torch.equal(stock_python.logits(tmp_path / "repaired"), repaired)

    assert reload_check(tmp_path / "repaired", repaired, token_ids(), **here)["reload_ok"]
    footprint = Footprint.of_experts(model.backbone, model.expert_set)
    audit = audit_files(tmp_path / "base", tmp_path / "repaired", footprint)
    assert audit["untouched_identical"], audit["moved_outside"]
    assert audit["experts_changed"] == len(model.expert_set)
    assert audit["gate_weights_changed"] == 0.0

    damaged = copy.deepcopy(model.model)
    with torch.no_grad():
        for name, parameter in Backbone.of(damaged).expert_parameters().items():
            for layer, expert in model.expert_set.pairs:
                if f".layers.{layer}." in name:
                    parameter[expert] = 0.0
    save_checkpoint(damaged, tokenizer, tmp_path / "damaged")
    assert not reload_check(tmp_path / "damaged", repaired, token_ids(), **here)["reload_ok"]
    passed(reload=True)


def test_llama4_is_refused_with_the_reason(found: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"'llama4_text' is not supported: llama4 runs every expert") as refusal:
        Backbone.of(llama4())
    assert "\n" not in str(refusal.value)
    found[LLAMA4] = {"refused": str(refusal.value).partition(": ")[2]}


@pytest.mark.parametrize("page", backbone_table.PAGES, ids=lambda page: page.name)
def test_the_table_in_the_documentation_is_what_these_tests_found(
    page: Path, found: dict[str, dict[str, Any]]
) -> None:
    """Compared row by row, so that a run of some families compares those."""
    whole = [
        name
        for name, result in found.items()
        if "refused" in result
        or (
            {"layers", *backbone_table.CHECKS} <= result.keys()
            and ("shared trains" in result or result["shared"] is None)
        )
    ]
    if not whole:
        pytest.skip("no family ran through all checks in this session")
    text = backbone_table.between_markers(page.read_text())
    assert text is not None, f"{page.name} has no backbone table"
    lines = text.splitlines()
    assert lines[:2] == backbone_table.header()
    assert len(lines) == 2 + len(backbone_table.MODEL_TYPES)
    rows = dict(zip(backbone_table.MODEL_TYPES, lines[2:], strict=True))
    for name in whole:
        assert rows[name] == backbone_table.row(name, found[name]), "run: python -m tests.moe.backbone_table"
