"""A correction found on packed weights and exported from the unquantised base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.organism.build import Organism
from tests.methods.lomc.conftest import LOOSE, assert_corrected
from trainer.cli.app import main

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_correction_found_on_packed_weights_is_made_of_the_bases_own(
    kind: str, lomc: Callable[..., Path], organism: Organism, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", str(lomc(**LOOSE, model__quantization=kind, correct__rounds=1))])
    assert left.value.code == 0
    folder = tmp_path / "runs" / "small"
    assert_corrected(organism.model, folder)
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["untouched_identical"] and audit["reload_ok"]
    assert "quantization_config" not in json.loads((folder / "model" / "config.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["after"]["over_refusal"]["rate"] < evaluation["before"]["over_refusal"]["rate"]
    assert "the figures above are those of the quantised model" in " ".join(capfd.readouterr().out.split())
    with pytest.raises(SystemExit) as left:
        main(["audit", str(folder), "--prompts", "4"])
    assert left.value.code == 0, "an audit measures base and export unquantised"
    assert {point["model"] for point in json.loads((folder / "robustness.json").read_text())} == {"base", "repaired"}
