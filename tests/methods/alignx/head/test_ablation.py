"""The table of the head's pieces: rows by name, and a control that only capacity could lift."""

from tests.methods.alignx.head import banks
from trainer.methods.alignx.head.ablation import ablation
from trainer.methods.alignx.head.fit import fit
from trainer.methods.alignx.head_section import HeadSection

FIGURES = {"accuracy", "ece_before", "ece_after", "brier"}


def test_shuffled_banks_give_no_more_than_the_gate_alone() -> None:
    bank, section = banks.of_dimensions(600), HeadSection()
    table = ablation(bank, section, 0)
    assert set(table) == {"gate_only", "gate_fractal", "gate_natural", "gate_fractal_natural", "gate_shuffled"}
    assert all(set(row) == FIGURES for row in table.values())
    accuracy = {name: row["accuracy"] for name, row in table.items()}
    assert accuracy["gate_fractal"] > accuracy["gate_only"] + 0.1
    assert abs(accuracy["gate_shuffled"] - accuracy["gate_only"]) < 0.08
    assert table["gate_fractal"] == fit(bank, section, 0).figures


def test_what_carries_no_signal_has_no_row() -> None:
    assert set(ablation(banks.constant(120), HeadSection(), 0)) == {"gate_only"}
    rows = ablation(banks.bank(120), HeadSection(natural="off", neighbours=8, epochs=2), 0)
    assert set(rows) == {"gate_only", "gate_fractal", "gate_shuffled"}
