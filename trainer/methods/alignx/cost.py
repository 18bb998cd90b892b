"""What answering costs, each way beside the base in one run: time of a generation, bytes of parameters, peak memory.

The baseline that a mixture of adapters has to beat holds three full copies of every MLP and mixes them token by token,
as a fusion of three whole models does (after H3Fusion, arXiv 2411.17792; the dense softmax gate is our reading). On an
MoE backbone the copied MLP is the whole block with its experts. An untrained gate and equal copies cost what trained
ones cost, and compute what the base computes.

Shapes: B prompts, S positions, H hidden size, C copies.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from torch import Tensor, nn

from data_prep.errors import UserError
from trainer.runtime.console import progress
from trainer.runtime.peak import cost_of

BASE = "base"
COPIES = 3
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
"""Names of the MLP in transformers' decoder layers."""


class MlpMixture(nn.Module):
    """Full copies of an MLP, all computed, mixed by a softmax over the token. Returns what the MLP returns."""

    def __init__(self, mlp: nn.Module, hidden: int):
        super().__init__()
        self.copies = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(COPIES - 1))])
        like = next(mlp.parameters())
        self.gate = nn.Linear(hidden, COPIES, bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.gate.weight)

    def forward(self, hidden_BSH: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight_BSC = self.gate(hidden_BSH).softmax(-1)
        found = [mlp(hidden_BSH, *args, **kwargs) for mlp in self.copies]
        # Some MoE blocks return their routing beside the states.
        states = [one[0] if isinstance(one, tuple) else one for one in found]
        mixed_BSH = cast(Tensor, sum(weight_BSC[..., c, None] * state_BSH for c, state_BSH in enumerate(states)))
        return (mixed_BSH, *found[0][1:]) if isinstance(found[0], tuple) else mixed_BSH


def mlp_mixture(model: nn.Module) -> nn.Module:
    """A copy of a causal language model with every MLP as a mixture of three.

    Raises:
        UserError: a decoder layer without an MLP of a name that is known.
    """
    made: Any = copy.deepcopy(model)
    hidden = made.config.get_text_config().hidden_size
    for index, layer in enumerate(made.get_decoder().layers):
        children = dict(layer.named_children())
        name = next((name for name in MLP_NAMES if name in children), None)
        if name is None:
            raise UserError(
                f"layer {index}: found {', '.join(children)}; a mixture of MLPs needs one of {', '.join(MLP_NAMES)}"
            )
        setattr(layer, name, MlpMixture(children[name], hidden))
    return cast(nn.Module, made.eval())


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts, [B, S] each, and the number of tokens that every way generates for each of them."""

    input_ids: Tensor
    attention_mask: Tensor
    new_tokens: int


def measure_cost(ways: Mapping[str, Callable[[], nn.Module]], prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Greedy generation by every way, taking turns.

    Args:
        ways: name -> the model that answers, with transformers' `generate`; one is called `base`. A call may build the
            model: it is let go of after its turn. Models that are held share memory as they like.
        rounds: turns of each; the figures are medians.

    Returns:
        Name -> {"seconds", "parameter_bytes", "peak_bytes"} and, as ratios to the base, {"latency", "parameters",
        "peak"}; latency is the median over the rounds of the ratio within a round. Seconds are of the clock on a GPU,
        of the processor on a CPU, where other processes may run. `peak_bytes`: parameters and buffers, and what a
        generation adds to allocated (GPU) or resident memory (CPU, Linux; elsewhere None) at its peak.
    """
    assert BASE in ways, "ratios are to the base"
    turns: dict[str, list[_Turn]] = {name: [] for name in ways}
    for number in progress(rounds, "cost"):
        # The first of a round is another one each time.
        names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        for name in names:
            turns[name].append(_turn(ways[name], prompts))
            gc.collect()
    base = turns[BASE]
    return {name: _figures(mine, base) for name, mine in turns.items()}


@dataclass(frozen=True)
class _Turn:
    seconds: float
    parameter_bytes: int
    growth: int | None


def _figures(mine: list[_Turn], base: list[_Turn]) -> dict[str, Any]:
    peak, base_peak = _peak(mine), _peak(base)
    return {
        "seconds": median(turn.seconds for turn in mine),
        "parameter_bytes": mine[0].parameter_bytes,
        "peak_bytes": peak,
        "latency": median(a.seconds / b.seconds for a, b in zip(mine, base, strict=True)),
        "parameters": mine[0].parameter_bytes / base[0].parameter_bytes,
        "peak": None if peak is None or base_peak is None else peak / base_peak,
    }


def _peak(turns: list[_Turn]) -> int | None:
    grown = [turn.growth for turn in turns if turn.growth is not None]
    return turns[0].parameter_bytes + round(median(grown)) if grown else None


def _turn(way: Callable[[], nn.Module], prompts: Prompts) -> _Turn:
    model = way()
    device = next(model.parameters()).device

    def generate() -> None:
        cast(Any, model).generate(
            input_ids=prompts.input_ids.to(device),
            attention_mask=prompts.attention_mask.to(device),
            do_sample=False,
            min_new_tokens=prompts.new_tokens,
            max_new_tokens=prompts.new_tokens,
        )

    generate()  # pays for what is made once
    cost = cost_of(generate, device)
    return _Turn(cost.seconds, held_bytes(model), cost.grown)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what is shared counts once."""
    storages = {
        (tensor.device, storage.data_ptr()): storage.nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())
