"""Runs of several seeds side by side, prompt by prompt: the table of docs/alignx.md.

    python -m tests.methods.alignx.seeds runs/organism-alignx runs/organism-alignx-1 ...

The axes of the recipe have equally many test prompts, so the mean over prompts is the mean over axes.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from scipy.stats import ttest_1samp

from trainer.runtime.console import table


def right(run: Path, name: str) -> list[bool]:
    """Whether each reply of a model was right, axis by axis."""
    found = json.loads((run / "axes" / f"{name}.json").read_text())["right"]
    return [hit for axis in found.values() for hit in axis]


def rows(runs: list[Path]) -> list[list[str]]:
    """Model, its mean in each run and over all, and what the mixture has more, with a paired 95 % interval."""
    made = []
    for name in sorted(path.stem for path in (runs[0] / "axes").glob("*.json")):
        means = [fmean(right(run, name)) for run in runs]
        more = [
            float(ours) - float(theirs)
            for run in runs
            for ours, theirs in zip(right(run, "mixture"), right(run, name), strict=True)
        ]
        low, high = ttest_1samp(more, 0.0).confidence_interval(0.95) if len(set(more)) > 1 else (0.0, 0.0)
        interval = f"{fmean(more):+.3f} [{low:+.3f}, {high:+.3f}]"
        made.append([name, *(f"{mean:.3f}" for mean in means), f"{fmean(means):.3f}", interval])
    return made


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    table(
        "right on held-out prompts",
        ["model", *(folder.name for folder in folders), "mean", "mixture has more"],
        rows(folders),
    )
    for folder in folders:
        found = json.loads((folder / "router.json").read_text())
        print(folder.name, {key: round(value, 4) for key, value in found.items() if isinstance(value, float)})
