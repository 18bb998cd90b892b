"""A tiny random model of every MoE family that is supported, built from the real transformers class.

Hidden size 32, 3 layers (or what the family's pattern needs), 8 experts, top-2. Selection biases, per-expert factors
and groups are switched on wherever the family has them, so that a scoring rule that ignores them is found out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

NUM_EXPERTS, TOP_K = 8, 2
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
QWEN = {"num_experts": NUM_EXPERTS, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16}
QWEN_SHARED = {**QWEN, "shared_expert_intermediate_size": 16}
HYBRID = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
IMAGE_TOKENS = {  # outside the vocabulary: these models read text alone here
    "image_token_id": 64,
    "video_token_id": 65,
    "vision_start_token_id": 66,
    "vision_end_token_id": 67,
}
TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
LOCAL = {"num_local_experts": NUM_EXPERTS, "intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """One model type: its classes, what its configuration needs, and what the backbone must find in it."""

    model_type: str
    architecture: str
    config: str
    options: dict[str, Any]
    scoring: str
    layers: tuple[int, ...] = (0, 1, 2)
    shared: str | None = None
    vision: dict[str, Any] | None = None
    scale: float = 1.0
    bias: tuple[str, ...] = field(default=())
    """Ends of the names of buffers and parameters that must not keep their constant initial value."""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The random model in fp32, in evaluation mode."""
        torch.manual_seed(seed)
        config_class = getattr(transformers, self.config)
        if self.vision is None:
            config = config_class(**{**COMMON, **self.options})
        else:
            config = config_class(text_config={**COMMON, **self.options}, **self.vision)
        model: PreTrainedModel = getattr(transformers, self.architecture)(config)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name.endswith(self.bias):
                    tensor.copy_(0.4 * torch.rand_like(tensor) + 0.5)
                elif tensor.ndim > 1 and isinstance(tensor, torch.nn.Parameter):
                    tensor.normal_(0, 0.2)  # norms stay 1 and biases 0, so that every expert is reached
        return model.eval()


CHOSEN, ALL = "softmax over chosen experts", "softmax over all experts"
SIGMOID = "sigmoid, renormalised"
SELECTION_BIAS = ("e_score_correction_bias",)

FAMILIES = (
    Family("olmoe", "OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 8, "intermediate_size": 16}, ALL),
    Family("flex_olmo", "FlexOlmoForCausalLM", "FlexOlmoConfig", {"num_experts": 8, "intermediate_size": 16}, ALL),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN_SHARED, ALL, shared="shared_expert"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**QWEN, "norm_topk_prob": True}, CHOSEN),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**QWEN_SHARED, **HYBRID},
        CHOSEN,
        shared="shared_expert",
    ),
    Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {**QWEN_SHARED, **HYBRID, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
        CHOSEN,
        shared="shared_expert",
        vision={"vision_config": TOWER, **IMAGE_TOKENS},
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {**QWEN, "rope_parameters": SECTIONS},
        CHOSEN,
        vision={"vision_config": {**TOWER, "deepstack_visual_indexes": [0]}, **IMAGE_TOKENS},
    ),
    Family("mixtral", "MixtralForCausalLM", "MixtralConfig", LOCAL, CHOSEN),
    Family("phimoe", "PhimoeForCausalLM", "PhimoeConfig", {**LOCAL, "router_jitter_noise": 0.1}, "sparsemixer"),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**LOCAL, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        CHOSEN,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**DEEPSEEK, **LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
        ALL,
        layers=(1, 2),
        shared="shared_experts",
        scale=1.5,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**DEEPSEEK, **LATENT_ATTENTION},
        SIGMOID,
        layers=(1, 2),
        shared="shared_experts",
        scale=1.5,
        bias=SELECTION_BIAS,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**DEEPSEEK, "head_dim": 16},
        SIGMOID,
        layers=(1, 2),
        shared="shared_experts",
        scale=1.5,
        bias=SELECTION_BIAS,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
        },
        CHOSEN,
        layers=(1, 2),
        shared="shared_experts",
        bias=SELECTION_BIAS,
    ),
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"num_experts": NUM_EXPERTS, "moe_topk": TOP_K, "intermediate_size": 16, "head_dim": 16},
        CHOSEN,
        shared="shared_mlp",
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**LOCAL, "head_dim": 16, "rotary_dim": 8},
        SIGMOID,
        bias=SELECTION_BIAS,
    ),
    Family("granitemoe", "GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL, CHOSEN),
    Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            "num_experts": NUM_EXPERTS,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "routed_scaling_factor": 1.5,
        },
        SIGMOID,
        layers=(1, 2),
        scale=1.5,
        bias=("expert_bias",),
    ),
    Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "num_experts": NUM_EXPERTS,
            "top_k_experts": TOP_K,
            "enable_moe_block": True,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        CHOSEN,
        shared="mlp",
        bias=("per_expert_scale",),
    ),
)
LLAMA4 = "llama4_text"
"""The model type that is refused; `llama4` builds it."""


def llama4() -> PreTrainedModel:
    sizes = {**LOCAL, "intermediate_size_mlp": 16, "head_dim": 16, "num_experts_per_tok": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**COMMON, **sizes}))
