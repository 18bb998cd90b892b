"""`python -m benchmarks`: ours and the alternatives side by side, taking turns; a table, a plot and JSON."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.plot import draw
from benchmarks.setting import SETTINGS, Setting
from benchmarks.trainers import TRAINERS
from benchmarks.ways import WAYS, split_share
from trainer.runtime.console import progress, table
from trainer.runtime.files import atomic_write
from trainer.runtime.peak import cost_of, now

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
MIB = 2**20


@dataclass
class Found:
    """Turns of one way. `grown`: bytes at the peak beyond what the process held before the model was made."""

    seconds: list[float] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    optimiser_bytes: int | None = None


def main(
    setting: Annotated[str, typer.Option(help=f"Sizes: {', '.join(SETTINGS)}.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; the figures are medians.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Names to measure; the floor is always among them.")] = None,
    out: Annotated[Path, typer.Option(help="The JSON; a plot of the same name lies beside it.")] = RESULTS
    / "latest.json",
) -> None:
    """Measure a step of every way, alternating in one process, each on a fresh copy of one model."""
    if setting not in SETTINGS:
        sys.exit(f"--setting: found {setting!r}; allowed: {', '.join(SETTINGS)}")
    sizes = SETTINGS[setting]
    ways = WAYS | {f"split_{share:.0%}".rstrip("%"): split_share(share) for share in sizes.shares}
    names = [*ways, *TRAINERS]
    if unknown := set(only or ()) - set(names):
        sys.exit(f"--only: found {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    wanted = [name for name in names if not only or name in only or name == "floor"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = sizes.model().state_dict()
    found = {name: Found() for name in wanted}
    for number in progress(rounds, "rounds"):
        turn = number % len(wanted)
        for name in wanted[turn:] + wanted[:turn]:
            _take_turn(name, ways, sizes, state, device, found[name])
    rows = [_row(name, one, found, sizes) for name, one in found.items()]
    written: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if device.type == "cuda" else "processor",
        "setting": sizes.name,
        "tokens": sizes.tokens,
        "critical_share": sizes.share,
        "rounds": rounds,
        "versions": {name: version(name) for name in LIBRARIES},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, json.dumps(written, indent=1))
    draw(written, out.with_suffix(".png"))
    columns = ["name", "seconds", "of the floor", "tokens/s", "peak MB", "of the floor", "optimiser MB"]
    cells = [[_shown(value) for value in list(row.values())[: len(columns)]] for row in rows]
    table(f"{sizes.name}; {sizes.tokens:,} tokens a step, medians of {rounds}", columns, cells)
    print(f"{out}, {out.with_suffix('.png')}")


def _take_turn(
    name: str, ways: dict[str, Any], sizes: Setting, state: dict[str, Tensor], device: torch.device, found: Found
) -> None:
    seconds: list[float] = []

    def turn() -> None:
        model = sizes.model(state, str(device))
        if name in TRAINERS:
            seconds.extend(TRAINERS[name](model, sizes))
            return
        step, optimiser = ways[name](model, sizes)
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(2, sizes.sizes["vocab_size"], (sizes.rows, sizes.length), generator=generator)
        ids_BS = ids_BS.to(device)
        step(ids_BS)  # pays for what is made once
        start = now(device)
        step(ids_BS)
        seconds.append(now(device) - start)
        if optimiser is not None:
            held = [t for of in optimiser.state.values() for t in of.values() if isinstance(t, Tensor)]
            found.optimiser_bytes = sum(t.numel() * t.element_size() for t in held)

    grown = cost_of(turn, device).grown
    found.seconds.append(statistics.median(seconds))
    if grown is not None:
        found.grown.append(grown)
    gc.collect()


def _row(name: str, one: Found, found: dict[str, Found], sizes: Setting) -> dict[str, Any]:
    floor = found["floor"]
    seconds = statistics.median(one.seconds)
    peak = statistics.median(one.grown) / MIB if one.grown else None
    floor_peak = statistics.median(floor.grown) / MIB if floor.grown else None
    return {
        "name": name,
        "seconds": seconds,
        "seconds_of_floor": statistics.median(a / b for a, b in zip(one.seconds, floor.seconds, strict=True)),
        "tokens_per_second": sizes.tokens / seconds,
        "peak_mb": peak,
        "peak_of_floor": None if peak is None or floor_peak is None else peak / floor_peak,
        "optimiser_mb": None if one.optimiser_bytes is None else one.optimiser_bytes / MIB,
        "all_seconds": one.seconds,
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    typer.run(main)
