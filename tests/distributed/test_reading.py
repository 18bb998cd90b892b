"""A checkpoint is read once, however many processes will share it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from tests.distributed.launching import start
from tests.planning.measure import config
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.runtime.processes import PATIENCE

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_all_processes_but_the_first_hold_their_share_alone(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(config())
    for name, model in (("model", whole), ("tiny", tiny_model("qwen3_moe"))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters()) / 2**20
    # glibc would keep freed blocks for itself.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    finished = start(engine, tmp_path, "tests.distributed.reading", tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    print({"model": round(size), "first": first["peak_mib"], "second": second["peak_mib"]})
    assert second["peak_mib"] < 0.75 * size
    assert first["patience_s"] == second["patience_s"] == PATIENCE.total_seconds()


def test_what_stops_the_first_process_stops_all_in_one_line(tmp_path: Path) -> None:
    """The others wait for it, and a wait would last until the launcher's patience ends."""
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "nothing"}')
    finished = start("fsdp2", tmp_path, "tests.distributed.reading", tmp_path, timeout=120)
    assert finished.returncode == 1
    assert finished.stderr.count("ValueError: ") + finished.stderr.count("UserError: ") >= 2
