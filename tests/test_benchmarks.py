"""The benchmark compares what it says: every way starts from the same model and trains the same experts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.setting import CPU, Setting
from benchmarks.trainers import STEPS, TRAINERS
from benchmarks.ways import WAYS
from trainer.moe.backbone import Backbone

SMALL = dataclasses.replace(
    CPU,
    sizes={
        **CPU.sizes,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
    },
    rows=8,
    length=24,
)


def ids(setting: Setting) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(2, setting.sizes["vocab_size"], (setting.rows, setting.length), generator=draw)


@pytest.mark.parametrize("name", list(WAYS))
def test_a_way_computes_the_model_and_trains_what_it_is_to_train(name: str) -> None:
    model = SMALL.model()
    backbone = Backbone.of(model)
    critical = SMALL.critical(backbone).pairs
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = {key: layer.index for layer in backbone for key in before if key.startswith(f"{layer.experts_name}.")}
    expected = model(input_ids=ids(SMALL)).logits.detach()
    step, _ = WAYS[name](model, SMALL)
    if name not in ("peft", "split_lora"):  # a step of PEFT's wrapper has other names; LoRA starts at zero in both
        torch.testing.assert_close(model(input_ids=ids(SMALL)).logits, expected, atol=1e-5, rtol=1e-4)
    for _ in range(2):
        step(ids(SMALL))
    after = model.state_dict()
    moved = {
        (fused[key], row)
        for key in before.keys() & after.keys()
        if key in fused
        for row in (before[key] != after[key]).flatten(1).any(1).nonzero()[:, 0].tolist()
    }
    others = {
        key for key in before.keys() & after.keys() if key not in fused and not torch.equal(before[key], after[key])
    }
    assert moved <= critical if name != "full" else moved > critical
    assert bool(others) == (name == "full")
    assert not torch.equal(model(input_ids=ids(SMALL)).logits, expected) or name == "floor"


@pytest.mark.parametrize("name", list(TRAINERS))
def test_a_trainer_gives_the_time_of_every_step_but_the_first(name: str) -> None:
    seconds = TRAINERS[name](SMALL.model(), SMALL)
    assert len(seconds) == STEPS - 1 and all(second > 0 for second in seconds)


def test_the_command_refuses_names_that_it_does_not_know(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "splt"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.startswith("--only: found splt; allowed: floor, full, mask")


def test_the_kept_result_holds_every_way(root: Path) -> None:
    found = json.loads((root / "benchmarks/results/latest.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert {*WAYS, *TRAINERS} <= set(names) and found["versions"].keys() >= {"torch", "transformers", "peft", "trl"}
    floor = next(row for row in found["rows"] if row["name"] == "floor")
    assert floor["seconds_of_floor"] == floor["peak_of_floor"] == 1
