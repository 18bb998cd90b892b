"""Sizes that are compared at: a small model for CPUs, shapes of published ones for a GPU. Weights are random.

Shapes: T tokens of a step, E experts of a layer, K of them chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet
from trainer.planning.parts import spread_evenly


@dataclass(frozen=True)
class Setting:
    """`rows` x `length` tokens a step. `share`: of all routed experts, those that are critical."""

    name: str
    sizes: dict[str, int]
    rows: int
    length: int
    dtype: torch.dtype
    share: float = 0.125
    rank: int = 16
    shares: tuple[float, ...] = field(default=(0.03, 0.06, 0.25))

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def model(self, state: dict[str, torch.Tensor] | None = None, device: str = "cpu") -> PreTrainedModel:
        """A model of these sizes, with the weights of another one where they are given."""
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            **self.sizes,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        with torch.device(device):
            made: Any = Qwen3MoeForCausalLM(config).to(self.dtype)
        if state is not None:
            made.load_state_dict(state)
        return made

    def critical(self, backbone: Backbone, share: float | None = None) -> ExpertSet:
        """So many experts, as many in every layer."""
        return spread_evenly(round((share or self.share) * backbone.total_experts), backbone)


CPU = Setting(
    "8 layers x 32 experts, hidden 512, top-4",
    {
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    rows=16,
    length=64,
    dtype=torch.float32,
)
OLMOE = Setting(
    "OLMoE-1B-7B: 16 layers x 64 experts, hidden 2048, top-8",
    {
        "hidden_size": 2048,
        "moe_intermediate_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 50304,
    },
    rows=16,
    length=256,
    dtype=torch.bfloat16,
)
QWEN3 = Setting(
    "a slice of Qwen3-30B-A3B: 4 layers x 128 experts, hidden 2048, top-8",
    {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_hidden_layers": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    rows=16,
    length=256,
    dtype=torch.bfloat16,
)
SETTINGS = {"cpu": CPU, "olmoe": OLMOE, "qwen3": QWEN3}
