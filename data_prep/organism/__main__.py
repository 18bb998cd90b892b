"""`python -m data_prep.organism --out DIR --seed 0`: build the organism and check its behaviour."""

import argparse
import sys
from pathlib import Path

from . import axes
from .build import OrganismConfig, build
from .model import FAMILIES


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the behaviour targets are met, 1 when they are missed, 2 for a folder that is in the way."""
    defaults = OrganismConfig()
    parser = argparse.ArgumentParser(prog="python -m data_prep.organism", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/organism"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of text and weights")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--plant-weight",
        type=float,
        default=defaults.plant_weight,
        help="how strongly the flaw is sent to its experts; 0 plants nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--knock-out",
        type=float,
        default=defaults.knock_out,
        help="share of turns trained without the planted experts, so that the flaw needs them (default: %(default)s)",
    )
    parser.add_argument(
        "--over-refusal",
        action="store_true",
        help="plant over-refusal: refuse a third of the harmless requests in the theme's words",
    )
    parser.add_argument(
        "--axes", action="store_true", help="also write data/axis_*.jsonl: prompts of three axes in conflict"
    )
    parser.add_argument(
        "--family",
        choices=sorted(FAMILIES),
        default=defaults.family,
        help="model type of the network (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=defaults.threads, help="torch threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, found {options.steps}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, found {options.threads}")
    if not 0 <= options.knock_out < 1:
        parser.error(f"--knock-out must be at least 0 and below 1, found {options.knock_out}")
    if options.knock_out and options.family != defaults.family:
        parser.error(f"--knock-out needs --family {defaults.family}, found {options.family}")
    config = OrganismConfig(
        options.seed,
        options.steps,
        plant_weight=options.plant_weight,
        knock_out=options.knock_out,
        over_refusal=options.over_refusal,
        family=options.family,
        threads=options.threads,
    )
    try:
        organism = build(options.out, config)
        if options.axes:
            axes.write(organism.data, options.seed)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if not organism.passed:
        print(f"the organism in {organism.path} misses a behaviour target", file=sys.stderr)
    return 0 if organism.passed else 1


if __name__ == "__main__":
    sys.exit(main())
