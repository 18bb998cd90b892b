"""Chat templates as published checkpoints have them, on a byte-level tokenizer, and what their models write."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, OlmoeConfig, PreTrainedTokenizerFast

from trainer.model.chat import Chat
from trainer.recipe.sections import ModelSection

OLMOE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token }}"
    "{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
MAGISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{# [THINK]reasoning[/THINK] comes first #}"
)


def shipped(name: str) -> str:
    """A template that TRL ships to tell published checkpoints by."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Written:
    """What a model generates after the prompt, its end included, and the final answer in it."""

    text: str
    answer: str
    finished: bool = True


@dataclass(frozen=True)
class Case:
    """One family: its template and tokens, what its model writes, and a data set's answer "Yes." as its response.

    `marks`: added tokens that decoding keeps (special=False). `listed`: `eos_token_id` of the generation config.
    """

    name: str
    template: str
    eos: str
    special: tuple[str, ...]
    turn_end: str
    given: str
    written: tuple[Written, ...]
    marks: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_tokenizer(self.template, self.eos, self.special, self.marks)

    def chat(self, **section: Any) -> Chat:
        tokenizer = self.tokenizer()
        keys = {"chat_template_kwargs": self.kwargs} | section
        return Chat.of(Scripted(tokenizer, [], self.listed), tokenizer, ModelSection(name_or_path=self.name, **keys))


def byte_tokenizer(
    template: str, eos: str | None, special: tuple[str, ...] = (), marks: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Bytes, and two line breaks as one token, as real vocabularies have them."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["\u010a\u010a"] = len(vocabulary)
    plain = Tokenizer(models.BPE(vocabulary, [("\u010a", "\u010a")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=eos, bos_token="<s>", chat_template=template)
    built.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    return built


class Scripted(nn.Module):
    """Stands for a model that writes given tokens, row by row in the order asked, as `generate` returns them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: list[list[int]], listed: tuple[str, ...] = ()):
        super().__init__()
        self.rows = rows
        self.device = torch.device("cpu")
        self.config = OlmoeConfig(vocab_size=len(tokenizer), max_position_embeddings=4096)
        stops = [tokenizer.convert_tokens_to_ids(token) for token in listed]
        self.generation_config = GenerationConfig(eos_token_id=stops or None)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, synced_gpus: bool
    ) -> Tensor:
        made = self.rows[: len(input_ids)]
        self.rows = self.rows[len(input_ids) :]
        longest = max(map(len, made))
        pad = [row + [int(generation_config.pad_token_id)] * (longest - len(row)) for row in made]
        return torch.cat([input_ids, torch.tensor(pad)], 1)


NO = "I cannot help with that."
THOUGHT = "They ask for a lamp. Sure, here is how I see it: the rules say no."
ANALYSIS, FINAL = f"<|channel|>analysis<|message|>{THOUGHT}", "<|channel|>final<|message|>"
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>")

CASES = (
    Case(
        "gpt-oss", shipped("gptoss"), "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"),
        "<|return|>", "<|channel|>final<|message|>Yes.<|return|>",
        (
            Written(f"{ANALYSIS}<|end|><|start|>assistant{FINAL}{NO}<|return|>", NO),
            Written(f"{FINAL}{NO}<|return|>", NO),
            Written(ANALYSIS, "", False),
            Written(f"{ANALYSIS}<|end|><|start|>assistant", "", False),
            Written(f"{ANALYSIS}<|end|><|start|>assistant{FINAL}I cannot", "I cannot", False),
            Written(f"{ANALYSIS}<|end|><|start|>assistant<|channel|>commentary to=f json<|message|>{{}}<|call|>", ""),
        ),
        listed=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    Case(
        "qwen3", shipped("qwen3"), "<|im_end|>", QWEN, "<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>",
        (
            Written(f"<think>\n{THOUGHT}\n</think>\n\n{NO}<|im_end|>", NO),
            Written(f"<think>\n{THOUGHT}", "", False),
            Written(f"<think>\n{THOUGHT}\n</think>\n\nI cannot", "I cannot", False),
            Written(f"<think>\n{THOUGHT}<|im_end|>", ""),
            Written(f"<think>\n{THOUGHT}\n</think>\n\n{NO}<|endoftext|>", NO),
        ),
        marks=TAGS, listed=("<|im_end|>", "<|endoftext|>"),
    ),
    Case(
        "qwen3, thinking off", shipped("qwen3"), "<|im_end|>", QWEN, "<|im_end|>", "Yes.<|im_end|>",
        (Written(f"{NO}<|im_end|>", NO), Written("I cannot", "I cannot", False)),
        marks=TAGS, kwargs={"enable_thinking": False},
    ),
    Case(
        "qwen3-thinking", shipped("qwen3_5_think"), "<|im_end|>", QWEN, "<|im_end|>", "\n</think>\n\nYes.<|im_end|>",
        (
            Written(f"{THOUGHT}\n</think>\n\n{NO}<|im_end|>", NO),
            Written(f"{THOUGHT}", "", False),
            Written(f"{THOUGHT}<|im_end|>", ""),
        ),
        marks=TAGS,
    ),
    Case(
        "qwen3-instruct", shipped("qwen3_instruct_2507"), "<|im_end|>", QWEN, "<|im_end|>", "Yes.<|im_end|>",
        (Written(f"{NO}<|im_end|>", NO), Written(f"<think>\n{THOUGHT}\n</think>\n\n{NO}<|im_end|>", NO)),
        marks=TAGS,
    ),
    Case(
        "chatml with another eos", shipped("qwen3_instruct_2507"), "<|endoftext|>", QWEN, "<|im_end|>",
        "Yes.<|im_end|>", (Written(f"{NO}<|im_end|>", NO), Written(f"{NO}<|endoftext|>", NO)),
    ),
    Case(
        "deepseek-r1", shipped("deepseekv3"), "<\uff5cend\u2581of\u2581sentence\uff5c>",
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"), "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "\n</think>\n\nYes.<\uff5cend\u2581of\u2581sentence\uff5c>",
        (
            Written(f"{THOUGHT}\n</think>\n\n{NO}<\uff5cend\u2581of\u2581sentence\uff5c>", NO),
            Written(THOUGHT, "", False),
        ),
        marks=TAGS,
    ),
    Case(
        "glm-4", shipped("glm4moe"), "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>"),
        "<|user|>", "\n<think></think>\nYes.<|user|>",
        (
            Written(f"\n<think>{THOUGHT}</think>\n{NO}<|user|>", NO),
            Written(f"\n<think>{THOUGHT}", "", False),
            Written(f"\n<think></think>\n{NO}<|endoftext|>", NO),
        ),
        marks=TAGS, listed=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    Case(
        "glm-4, thinking off", shipped("glm4moe"), "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"), "<|endoftext|>",
        "\nYes.<|endoftext|>", (Written(f"\n{NO}<|endoftext|>", NO),),
        marks=TAGS, kwargs={"enable_thinking": False},
    ),
    Case(
        "mixtral", MIXTRAL, "</s>", ("<s>", "</s>"), "</s>", " Yes.</s>",
        (Written(f" {NO}</s>", NO), Written(" I cannot", "I cannot", False)), system=False,
    ),
    Case(
        "phi-3.5", shipped("phi3_5"), "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>", "Yes.<|end|>", (Written(f"{NO}<|end|>", NO), Written(f"{NO}<|endoftext|>", NO)),
    ),
    Case(
        "olmoe", OLMOE, "<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>", "Yes.<|endoftext|>",
        (Written(f"{NO}<|endoftext|>", NO), Written("I cannot", "I cannot", False)),
    ),
    Case(
        "llama-3", shipped("llama3"), "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"), "<|eot_id|>",
        "Yes.<|eot_id|>", (Written(f"{NO}<|eot_id|>", NO), Written(f"{NO}<|end_of_text|>", NO)),
        listed=("<|end_of_text|>", "<|eot_id|>"),
    ),
    Case(
        "magistral", MAGISTRAL, "</s>",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"), "</s>", "Yes.</s>",
        (Written(f"[THINK]{THOUGHT}[/THINK]{NO}</s>", NO), Written(f"[THINK]{THOUGHT}", "", False)),
    ),
    Case(
        "gemma-4", shipped("gemma4"), "<eos>",
        ("<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"), "<turn|>", "Yes.<turn|>",
        (
            Written(f"<|channel>thought\n{THOUGHT}\n<channel|>{NO}<turn|>", NO),
            Written(f"<|channel>thought\n{THOUGHT}", "", False),
            Written(f"{NO}<turn|>", NO),
        ),
        kwargs={"enable_thinking": True},
    ),
    Case(
        "cohere2", shipped("cohere2"), "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>",
         "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        "<|END_OF_TURN_TOKEN|>", "Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        (Written(f"{NO}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", NO),),
    ),
)  # fmt: skip
