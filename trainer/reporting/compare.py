"""Several runs side by side: what each reached, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from trainer.reporting.artefacts import Artefacts, read
from trainer.reporting.figures import is_rate

FIGURES = {
    "asr_seen": "ASR seen",
    "asr_unseen": "ASR unseen",
    "asr_robust": "ASR robust",
    "harmful_refusal": "plain refusal",
    "over_refusal": "over-refusal",
    "benign_compliance": "benign",
    "benign_wrapped_compliance": "wrapped benign",
}


def comparison(folders: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison: the first run's base model, then one row per run.

    Costs: share of weights that a stage trained (the largest of its stages), experts that differ from the base,
    seconds and peak memory (MB, resident, the largest) of the training stages.

    Raises:
        UserError: a folder without a finished evaluation.
    """
    columns = ["run", *FIGURES.values(), "restore gap", "experts changed", "weights trained", "training s", "peak MB"]
    runs = [_finished(folder) for folder in folders]
    rows = [["base", *(_rate(runs[0].before, name) for name in FIGURES), *([""] * 5)]]
    for run in runs:
        diagnostics, manifest = run.diagnostics, run.manifest
        trained = {name.partition("-")[2] for name in run.parameters}
        sizes = run.parameters.values()
        stages = [stage for name, stage in (manifest.get("stages") or {}).items() if name in trained]
        share = max((size["trained_parameters"] / size["total_parameters"] for size in sizes), default=0.0)
        gap, total = diagnostics.get("router_restore_gap"), diagnostics.get("experts_total")
        rows.append(
            [
                manifest.get("name") or run.folder.resolve().name,
                *(_rate(run.after, name) for name in FIGURES),
                "" if gap is None else f"{gap:.3f}",
                "" if total is None else f"{diagnostics.get('experts_changed')} of {total}",
                f"{share:.1%}",
                f"{sum(stage.get('seconds') or 0 for stage in stages):.0f}",
                f"{max((stage.get('peak_memory_mb') or 0 for stage in stages), default=0):.0f}",
            ]
        )
    return columns, rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a page of documentation."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(metrics: dict[str, Any], name: str) -> str:
    return f"{metrics[name]['rate']:.3f}" if is_rate(metrics.get(name)) else ""


def _finished(folder: Path) -> Artefacts:
    for name in ("evaluation.json", "manifest.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; compare takes the folders of finished runs")
    return read(folder)
