"""A whole run on packed weights: what it exports, and what is refused before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from data_prep.organism.build import Organism
from trainer.cli.app import main

Small = Callable[..., Path]

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

PACKED = {
    "model__quantization": "4bit",
    "repair__gradient_checkpointing": True,
    "repair__max_steps": 6,  # every row once: on some CPUs one of the experts has no token in the first 64 of them
    "consistency__gradient_checkpointing": True,
}


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_packed_model_is_repaired_and_the_unpacked_base_exported(
    small: Small, organism: Organism, tmp_path: Path, lora_rank: int | None
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", str(small(**PACKED, repair__lora_rank=lora_rank))])
    assert left.value.code == 0
    audit = json.loads((tmp_path / "runs/small/audit.json").read_text())
    assert audit["untouched_identical"] and audit["experts_changed"] == 8 and audit["reload_ok"]
    config = json.loads((tmp_path / "runs/small/model/config.json").read_text())
    assert "quantization_config" not in config
    sizes = json.loads((tmp_path / "runs/small/stages/1-repair-1/parameters.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(organism.path / "model")
    assert sizes["total_parameters"] == sum(p.numel() for p in base.parameters()), "not the number of packed bytes"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repair__scope": "full"}, "repair.scope: found 'full', which trains every layer"),
        ({"detect__score": "saliency"}, "detect.score: found 'saliency', which needs gradients of quantised tensors"),
        ({"repair__gradient_checkpointing": False}, "repair.gradient_checkpointing: expected true"),
        ({"consistency__gradient_checkpointing": False}, "consistency.gradient_checkpointing: expected true"),
        ({"model__quantization": "3bit"}, "model.quantization: found '3bit' (str), expected '4bit' or '8bit'"),
    ],
)
def test_what_cannot_be_trained_on_packed_weights_is_refused(
    small: Small, refused: Callable[..., str], changes: dict[str, object], says: str
) -> None:
    assert says in refused("run", small(**PACKED | changes))
