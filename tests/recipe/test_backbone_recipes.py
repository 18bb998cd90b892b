"""RASA's recipe of every backbone: the model and data it names, the share it trains, the machine it says it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig

from trainer.methods.rasa.plan import planned
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.methods.table import load_recipe
from trainer.planning.plan import GB, plan

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
HEADER = re.compile(
    r"--engine (\w+)(?: --gpus (\d+))?\n# (\d+) x 80 GB GPU, (\d+) GB used on each(?:; (\d+) GB of host memory)?"
)
DATA_SETS = {  # of the Hub, with the split and the format that reads its columns
    "walledai/AdvBench": ("train", "records"),
    "tatsu-lab/alpaca": ("train", "alpaca"),
    "walledai/XSTest": ("test", "xstest"),
}
QWEN = {"hidden_size": 2048, "vocab_size": 151936}
LINEAR = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128}
MLA = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

# folder -> (Hub id, configuration class, published sizes, published number of parameters, MoE layers, experts)
BACKBONES: dict[str, tuple[str, str, dict[str, Any], float, int, int]] = {
    "olmoe-1b-7b": (
        "allenai/OLMoE-1B-7B-0125-Instruct",
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304},
        6.92e9,
        16,
        64,
    ),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        "Qwen3MoeConfig",
        QWEN
        | {"moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128}
        | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
        30.5e9,
        48,
        128,
    ),
    "gpt-oss-20b": (
        "openai/gpt-oss-20b",
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "vocab_size": 201088},
        20.9e9,
        24,
        32,
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "MixtralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000},
        46.7e9,
        32,
        8,
    ),
    "phi-3.5-moe": (
        "microsoft/Phi-3.5-MoE-instruct",
        "PhimoeConfig",
        {"hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "num_local_experts": 16, "vocab_size": 32064}
        | {"attention_bias": True, "lm_head_bias": True},
        41.9e9,
        32,
        16,
    ),
    "deepseek-v2-lite": (
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "DeepseekV2Config",
        {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2}
        | {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400, "topk_method": "greedy"}
        | MLA,
        15.7e9,
        26,
        64,
    ),
    "qwen1.5-moe-a2.7b": (
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        "Qwen2MoeConfig",
        QWEN
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
        14.3e9,
        24,
        60,
    ),
    "qwen3-next-80b-a3b": (
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen3NextConfig",
        QWEN
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_hidden_layers": 48}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_value_head_dim": 128}
        | {"num_experts": 512, "num_experts_per_tok": 10}
        | LINEAR,
        79.7e9,
        48,
        512,
    ),
}
LARGEST = "qwen3-next-80b-a3b"  # half a minute of meta tensors
PLANNED = [pytest.param(f, marks=pytest.mark.slow) if f == LARGEST else f for f in BACKBONES]


def recipe_of(folder: str) -> RasaRecipe:
    recipe = load_recipe(RECIPES / folder / "rasa.yaml")
    assert isinstance(recipe, RasaRecipe)
    return recipe


def published(folder: str) -> PreTrainedConfig:
    _, config_class, sizes, *_ = BACKBONES[folder]
    config: PreTrainedConfig = getattr(transformers, config_class)(**sizes)
    return config


@pytest.mark.parametrize("folder", BACKBONES)
def test_it_names_the_model_and_data_sets_that_there_are(folder: str) -> None:
    recipe = recipe_of(folder)
    assert recipe.model.name_or_path == BACKBONES[folder][0] and recipe.run.name == f"{folder}-rasa"
    assert not recipe.model.trust_remote_code
    for source in (recipe.data.harmful, recipe.data.benign, recipe.data.borderline):
        assert (source.hub_split, source.format) == DATA_SETS[source.path]
    (task,) = recipe.data.capability
    assert (task.path, task.hub_config, task.hub_split, task.format) == ("openai/gsm8k", "main", "test", "qa")
    assert recipe.data.jailbreaks.families == ["all"], "nobody has to bring templates to start"


@pytest.mark.parametrize("folder", BACKBONES)
def test_it_repairs_an_eighth_of_the_experts_in_batches_of_16(folder: str) -> None:
    recipe = recipe_of(folder)
    *_, layers, experts = BACKBONES[folder]
    assert recipe.detect.top_k == layers * experts / 8
    assert recipe.repair.given_arguments["per_device_train_batch_size"] * machine(folder)[1] == 16
    assert recipe.schedule.rounds == 3


@pytest.mark.parametrize("folder", PLANNED)
def test_it_fits_the_machine_that_it_names(folder: str) -> None:
    engine, gpus, used, host = machine(folder)
    recipe = recipe_of(folder)
    found = plan(recipe, planned(recipe), published(folder), gpus=gpus, gpu_memory_gb=80)
    *_, parameters, layers, experts = BACKBONES[folder]
    assert found.parts.total == pytest.approx(parameters, rel=2e-3)
    assert found.parts.routed_experts == layers * experts
    assert found.fits(engine)
    assert found.per_gpu(engine).total / GB == pytest.approx(used, rel=0.15)
    assert host is None or found.host_memory(engine) / GB == pytest.approx(host, rel=0.15)


def machine(folder: str) -> tuple[str, int, int, int | None]:
    """(engine, GPUs, GB used on each, GB of host memory) as the recipe's first lines say."""
    header = HEADER.search((RECIPES / folder / "rasa.yaml").read_text())
    assert header is not None, "the header names an engine and a machine"
    engine, given, gpus, used, host = header.groups()
    assert given in (None, gpus)
    return engine, int(gpus), int(used), int(host) if host else None
