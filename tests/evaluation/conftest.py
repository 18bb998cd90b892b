"""A tiny random OLMoE with a word-level tokenizer, and a small corpus to ask it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from data_prep.config import DataConfig
from data_prep.schema import Conversation, Corpus, Prompt, Split, Task, Wrapper
from trainer.model.chat import Chat

WORDS = [f"w{index}" for index in range(60)]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<assistant> ' }}{{ m['content'] }}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    built.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    built.chat_template = TEMPLATE
    return built


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def model() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=65, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        initializer_range=0.4,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


@pytest.fixture
def prompts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (13,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(0, 60, (n,), generator=generator)) for n in lengths]


@pytest.fixture
def corpus() -> Corpus:
    def made(kind: str, count: int, first: int) -> list[Prompt]:
        return [
            Prompt(id=f"{kind}-{i}", conversation=Conversation.of(f"w{first + i} w{i}"), kind=kind)
            for i in range(count)
        ]

    roles = ["seen", "seen", "unseen", "robust", "seen"]
    wrappers = [
        Wrapper(id=f"wrap-{i}", family=f"family-{i // 2}", role=role, text=f"w5{i} [GOAL] w4{i}", placeholder="[GOAL]")
        for i, role in enumerate(roles)
    ]
    return Corpus(
        harmful=Split(train=made("harmful", 2, 30), test=made("harmful", 4, 0)),
        benign=Split(train=[], test=made("benign", 5, 10)),
        borderline=Split(train=[], test=made("borderline", 3, 20)),
        wrappers=wrappers,
        tasks=[
            Task(
                "sums",
                "exact_match",
                [Prompt("s0", Conversation.of("w1 w2"), "capability", "3")],
            ),
            Task(
                "words",
                "token_accuracy",
                [Prompt("t0", Conversation.of("w1"), "capability", "w2 w3 w4")],
            ),
        ],
    )


@pytest.fixture
def data() -> DataConfig:
    """A recipe's data section that gives every part of the corpus."""
    source = {"path": "prompts.jsonl", "test": 1}
    jailbreaks = {"path": "wrappers.json", "seen": ["a"], "unseen": ["b"], "robust": ["c"]}
    return DataConfig(harmful=source, benign=source, borderline=source, jailbreaks=jailbreaks)
