"""Every engine trains the same model: the same losses and weights as one process, and the engine is really in use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.launching import start

CASES = [
    "inference",
    "full",
    "lora",
    "gates",
    "accumulation",
    "checkpointing",
    "bf16",
    "shared",
    "shared_bf16",
    "loaded",
    "whole_bf16",
]
FAST = ["zero3", "fsdp2"]
SLOW = ["ddp", "zero1", "zero2", "zero3-offload"]
ALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

Ran = Callable[[str], Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Folder of what an engine's processes wrote, run once per engine."""

    @cache
    def started(engine: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(engine)
        try:
            finished = start(engine, folder, "tests.distributed.worker", folder, *CASES)
        except subprocess.TimeoutExpired as late:
            return folder, str(late)
        return folder, finished.stderr[-4000:] if finished.returncode else ""

    def run(engine: str) -> Path:
        folder, wrong = started(engine)
        assert not wrong, wrong
        return folder

    return run


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        ((found[name].double() - t.double()).norm() / t.double().norm().clamp(min=1e-12)).item()
        for name, t in expected.items()
    )


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("case", ["full", "lora", "gates", "accumulation", "checkpointing", "shared", "loaded"])
def test_losses_and_weights_equal_those_of_one_process(ran: Ran, engine: str, case: str) -> None:
    alone, together = ran("single"), ran(engine)
    losses, expected = read(together, f"{case}-0")["losses"], read(alone, f"{case}-0")["losses"]
    assert losses == pytest.approx(expected, rel=1e-5)
    for part in (case, f"{case}-stock"):
        weights = load_file(together / f"{part}.safetensors")
        assert distance(weights, load_file(alone / f"{part}.safetensors")) < 1e-5


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("case", ["bf16", "shared_bf16", "whole_bf16"])
def test_a_16_bit_model_trains_to_the_same_weights_up_to_its_precision(ran: Ran, engine: str, case: str) -> None:
    weights, expected = (load_file(ran(name) / f"{case}.safetensors") for name in (engine, "single"))
    assert distance(weights, expected) < 2e-2


@pytest.mark.parametrize("engine", ALL)
def test_counts_and_replies_are_exactly_those_of_one_process_on_every_rank(ran: Ran, engine: str) -> None:
    expected = read(ran("single"), "inference-0")
    assert [read(ran(engine), f"inference-{rank}") for rank in (0, 1)] == [expected, expected]


@pytest.mark.parametrize("engine", ALL)
def test_the_engine_is_really_in_use(ran: Ran, engine: str) -> None:
    proofs = [proof for case in ("full", "lora", "gates") for proof in read(ran(engine), f"{case}-0")["proofs"]]
    assert {proof["engine"] for proof in proofs} == {engine}
    for proof in proofs:
        if engine == "ddp":
            assert proof["wrapped"] == "DistributedDataParallel"
        elif engine == "fsdp2":
            assert proof["wrapped"].startswith("FSDP") and proof["dtensors"]
        else:
            assert (proof["wrapped"], proof["zero_stage"]) == ("DeepSpeedEngine", int(engine[4]))
            assert proof["partitioned"] == (proof["zero_stage"] == 3)


@pytest.mark.parametrize("engine", ["single", *ALL])
@pytest.mark.parametrize("case", ["full", "lora", "gates"])
def test_optimiser_state_exists_for_trainable_parameters_only(ran: Ran, engine: str, case: str) -> None:
    """AdamW holds two moments of 4 bytes for each fp32 weight; ZeRO and FSDP2 hold a share of them on each rank."""
    ranks = (0,) if engine in ("single", "ddp") else (0, 1)
    for stage, proof in enumerate(read(ran(engine), f"{case}-0")["proofs"]):
        held = sum(read(ran(engine), f"{case}-{rank}")["proofs"][stage]["moment_bytes"] for rank in ranks)
        # Partitions are padded to equal length.
        assert 2 * proof["trainable_bytes"] <= held <= 2 * proof["trainable_bytes"] + 1024
