"""Tiny guard models: real checkpoints, whose weights are set by hand so that they speak a published format.

They look for two words in what they are asked: "sorry" makes a reply a refusal, "boom" makes it harmful. An answer is
one token of the vocabulary, spelt as the format has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 2048
PLAIN = "{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}assistant :\n"
IN_PARTS = "{% for m in messages %}{{ m.role }} : {{ m.content[0]['text'] }}\n{% endfor %}assistant :\n"
WITH_GUIDELINE = "{{ guideline }}\n{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}answer :\n"
TOLD = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}\nassistant :\n{% endif %}"


@dataclass(frozen=True)
class Speaks:
    """`answer(refuses, harmful)`: what a model of the format writes."""

    template: str
    answer: Callable[[bool, bool], str]


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


SPEAKS: dict[str, Speaks] = {
    "qwen3guard": Speaks(
        PLAIN, lambda r, h: f"Safety: {'Unsafe' if h else 'Safe'}\nCategories: None\nRefusal: {_yes(r)}"
    ),
    "llama-guard": Speaks(IN_PARTS, lambda r, h: "\n\nunsafe\nS1" if h else "\n\nsafe"),
    "shieldgemma": Speaks(WITH_GUIDELINE, lambda r, h: _yes(h)),
    "wildguard": Speaks(
        PLAIN,
        lambda r, h: f"Harmful request: no\nResponse refusal: {_yes(r).lower()}\nHarmful response: {_yes(h).lower()}",
    ),
    "rubric": Speaks(TOLD, lambda r, h: f"Refusal: {_yes(r)}\nHarmful: {_yes(h)}"),
}


@torch.no_grad()
def build(folder: Path, format: str) -> Path:
    """Save the tiny model of a format.

    One layer, whose attention is the mean over all tokens: it tells whether one of the two words is among them.
    """
    tokenizer, answers = _tokenizer(SPEAKS[format])
    size = 8
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, intermediate_size=size, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=POSITIONS, pad_token_id=0,
            eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    constant, sorry, boom, answered, said_sorry, said_boom = range(6)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    embedding, layer, head = model.model.embed_tokens.weight, model.model.layers[0], model.lm_head.weight
    embedding[:, constant] = 1
    embedding[tokenizer.convert_tokens_to_ids("sorry"), sorry] = 1
    embedding[tokenizer.convert_tokens_to_ids("boom"), boom] = 1
    embedding[list(answers.values()), answered] = 1
    # Present once among all positions, a word outweighs the constant.
    layer.self_attn.v_proj.weight[sorry, sorry] = layer.self_attn.v_proj.weight[boom, boom] = 1
    layer.self_attn.o_proj.weight[said_sorry, sorry] = layer.self_attn.o_proj.weight[said_boom, boom] = 2 * POSITIONS
    head[:, constant] = -1e6
    for (refuses, harmful), token in answers.items():
        head[token, constant] = 0
        for place, present in ((said_sorry, refuses), (said_boom, harmful)):
            sign = 1 if present else -1
            head[token, place] += sign
            head[token, constant] -= sign
    head[1, answered] = 1e7
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(speaks: Speaks) -> tuple[PreTrainedTokenizerFast, dict[tuple[bool, bool], int]]:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "sorry", "boom"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=speaks.template
    )
    sides = [(refuses, harmful) for refuses in (False, True) for harmful in (False, True)]
    texts = {side: speaks.answer(*side) for side in sides}
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in dict.fromkeys(texts.values())])
    # A format that tells harm alone has one answer for two sides: the first of them stands for both.
    return tokenizer, {side: tokenizer.convert_tokens_to_ids(text) for side, text in texts.items()}
