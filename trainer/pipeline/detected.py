"""What every method's detection leaves in the run folder: the table of activations, the expert set, its heat map."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from trainer.moe.expert_set import ExpertSet
from trainer.reporting import plots
from trainer.runtime.files import atomic_write, replacing

ACTIVATIONS, EXPERT_SET, HEAT_MAP = FILES = ("activations.parquet", "expert_set.json", "expert_set.png")


def write_detected(folder: Path, table: pd.DataFrame, experts: ExpertSet) -> None:
    """Write `FILES`. `table`: a row per expert, with its score."""
    with replacing(folder / ACTIVATIONS) as temporary:
        table.to_parquet(temporary, index=False)
    atomic_write(folder / EXPERT_SET, experts.to_json())
    plots.save_heat_map(table, experts.pairs, folder / HEAT_MAP)
