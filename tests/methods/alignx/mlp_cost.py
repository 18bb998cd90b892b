"""What three full copies of every MLP cost beside their base, in generation; the ratios of docs/alignx.md.

python -m tests.methods.alignx.mlp_cost [layers hidden experts top_k batch]

A random model in the shape of OLMoE-1B-7B (16 layers of 64 experts, top-8), narrower.
"""

import sys

import torch

from tests.tiny import narrow_olmoe
from trainer.methods.alignx.cost import Prompts, measure_cost, mlp_mixture
from trainer.runtime.console import table


def rows(layers: int, hidden: int, experts: int, top_k: int, batch: int) -> list[list[str]]:
    model = narrow_olmoe(layers, hidden, experts, top_k, eos_token_id=1)
    ids = torch.randint(2, 512, (batch, 16))
    ways = {"base": lambda: model, "three MLPs": lambda: mlp_mixture(model)}
    found = measure_cost(ways, Prompts(ids, torch.ones_like(ids), 16), 5)
    return [[name, *(f"{one[key]:.2f}" for key in ("latency", "parameters", "peak"))] for name, one in found.items()]


if __name__ == "__main__":
    sizes = [int(value) for value in sys.argv[1:]] or [16, 128, 64, 8, 4]
    table("Cost, as ratios to the base", ("way", "latency", "parameters", "peak memory"), rows(*sizes))
