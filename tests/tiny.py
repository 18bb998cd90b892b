"""Tiny random models of real transformers classes, and a tokenizer with a chat template, for tests on the CPU."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trainer.model.chat import Chat

WORDS = [f"w{i}" for i in range(56)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<assistant> {{ m['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss")
NUM_EXPERTS, NUM_LAYERS, TOP_K = 8, 3, 2


def tiny_model(family: str = "olmoe", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model: 3 MoE layers of 8 experts, top-2, hidden 32; gpt_oss has transposed, biased experts."""
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "num_experts_per_tok": TOP_K,
    }
    torch.manual_seed(seed)
    if family == "olmoe":
        model: PreTrainedModel = OlmoeForCausalLM(OlmoeConfig(intermediate_size=16, num_experts=NUM_EXPERTS, **common))
    elif family == "qwen3_moe":
        sizes = {"moe_intermediate_size": 16, "intermediate_size": 16, "num_experts": NUM_EXPERTS, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(norm_topk_prob=True, **sizes, **common))
    else:
        sizes = {"intermediate_size": 24, "num_local_experts": NUM_EXPERTS, "head_dim": 16}
        model = GptOssForCausalLM(GptOssConfig(**sizes, **common))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # norms stay 1 and biases 0, so that every expert is reached
            parameter.data.normal_(0, 0.2)
    return model.to(dtype).eval()


def narrow_olmoe(
    layers: int, hidden: int, experts: int, top_k: int, *, eos_token_id: int | None = None
) -> OlmoeForCausalLM:
    """A random model in the shape of OLMoE-1B-7B (16 layers of 64 experts, top-8), of any size; to be timed."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        pad_token_id=0,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )
    return OlmoeForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 64 words with `<user>` / `<assistant>` turns."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def token_ids(rows: int = 3, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def tiny_chat() -> Chat:
    """That tokenizer, as the rooms take it."""
    return Chat(tiny_tokenizer())
