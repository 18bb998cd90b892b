"""The organism's tokenizer and untrained network: a byte-level BPE that loses nothing, and a four-layer MoE."""

import itertools
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .text import stream

PAD, EOS, ROLE_TOKENS = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
EXPERTS, TOP_K, BALANCE = 16, 2, 0.01
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 64, "head_dim": 16},
    "qwen3_next": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "deepseek_v2": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
}
"""Model type -> what its configuration needs besides the sizes that all share."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(seed: int, examples: int = 4000, vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `examples` training examples, with chat template, pad and end tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, EOS, *ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (part for e in itertools.islice(stream(seed), examples) for part in (e.prompt, e.reply))
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[AddedToken(token, special=True) for token in ROLE_TOKENS],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, family: str = "olmoe") -> PreTrainedModel:
    """An untrained float32 model of a family for `tokenizer`: 4 layers x 16 experts, 2 of them per token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        router_aux_loss_coef=BALANCE,
        dtype=torch.float32,
        **FAMILIES[family],
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
