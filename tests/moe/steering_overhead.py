"""What steering costs in generation: the ratio steered / plain, both measured in one process, taking turns.

python -m tests.moe.steering_overhead [layers hidden experts top_k batch steered_layers]

A random model in the shape of OLMoE-1B-7B (16 layers of 64 experts, top-8), narrower; steered as in the paper's
table: one expert activated in each of 5 layers.
"""

import statistics
import sys
import time

import torch

from tests.tiny import narrow_olmoe
from trainer.moe.backbone import Backbone
from trainer.moe.steering import Steering, steer

NEW_TOKENS = 32


def overhead(layers: int, hidden: int, experts: int, top_k: int, batch: int, steered: int, rounds: int = 11) -> float:
    """Steered over plain time of the same greedy generation, the median over rounds.

    In processor time, because other processes may run.
    """
    model = narrow_olmoe(layers, hidden, experts, top_k)
    backbone = Backbone.of(model).check()
    steering = Steering({i * layers // steered: (0,) for i in range(steered)})
    ids = torch.randint(1, 512, (batch, 16))

    def seconds() -> float:
        start = time.process_time()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        return time.process_time() - start

    seconds()
    ratios = []
    for turn in range(rounds):
        plain = seconds() if turn % 2 else 0.0
        with steer(backbone, steering):
            steered = seconds()
        ratios.append(steered / (plain or seconds()))
    return statistics.median(ratios)


if __name__ == "__main__":
    sizes = [int(value) for value in sys.argv[1:]] or [16, 256, 64, 8, 4, 5]
    print(f"steered / plain generation: {overhead(*sizes):.3f}")
