"""A model that lies in parts on several processes is corrected as a whole one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import start
from tests.methods.lomc.conftest import LOOSE


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_sharded_model_is_corrected_and_exported_as_a_whole_one(
    engine: str, lomc: Callable[..., Path], tmp_path: Path
) -> None:
    def recipe(folder: Path) -> Path:
        return lomc(**LOOSE, correct__strengths=[0.5, 0.75], run__output_dir=str(folder))

    runs = {}
    for name in ("single", engine):
        folder = tmp_path / name
        folder.mkdir()
        made = start(name, folder, "trainer", "run", recipe(folder))
        assert made.returncode == 0, made.stderr[-4000:]
        runs[name] = folder / "small"
    alone, together = (runs[name] for name in ("single", engine))
    supports = [json.loads((run / "support.json").read_text())["units"] for run in (alone, together)]
    assert supports[0] == supports[1]
    later = [json.loads((run / "rounds.json").read_text()) for run in (alone, together)]
    assert len(later[0]) == len(later[1]) == 1, "a second round, which finds the same"
    chose = [[found[0][key] for key in ("prototypes", "strength", "left")] for found in later]
    assert chose[0] == chose[1]
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (together, alone))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5)
    figures = [json.loads((run / "evaluation.json").read_text())["after"]["over_refusal"] for run in (alone, together)]
    assert figures[0] == figures[1]
