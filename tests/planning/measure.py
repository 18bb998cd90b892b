"""Peak memory of a real repair stage beside the planned one: `python -m tests.planning.measure CASE ...`.

Under a launcher every rank prints its line; see docs/planning.md. A case is words joined by "+": `full`, `lora`,
`gates`, `ckpt` (checkpointing), `kl`, `bf16`, `whole` (full fine-tuning), `accumulate`, `onednn` (leave it on). The
model is random, of real classes, about 460 MB in fp32; a tiny stage runs first so that libraries are loaded before the
baseline is read.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from data_prep.schema import Conversation
from tests.tiny import tiny_chat, tiny_model
from trainer.engines import memory as engines
from trainer.engines.engine import engine
from trainer.methods.rasa.plan import critical, planned
from trainer.methods.rasa.recipe import RasaRecipe
from trainer.methods.table import recipe_of
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.experts import SplitModel
from trainer.moe.trainable import TrainableModel, WholeModel
from trainer.planning.plan import plan
from trainer.runtime.processes import PeakMemory, rank, world_size
from trainer.training.repair import Stream, TrainingRow, repair_experts

ROWS, LENGTH, STEPS = 4, 128, 2
MIB = 2**20


def config() -> PreTrainedConfig:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    experts = {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    tokens = {"vocab_size": 8192, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Qwen3MoeConfig(**sizes, **experts, **heads, **tokens, tie_word_embeddings=False)


def recipe(case: set[str]) -> RasaRecipe:
    repair: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "max_length": LENGTH,
        "max_steps": STEPS,
        "retain_loss": "kl" if "kl" in case else "ce",
        "train_gates": "gates" in case,
        "gradient_checkpointing": "ckpt" in case,
        "gradient_accumulation_steps": 2 if "accumulate" in case else 1,
        "scope": "full" if "whole" in case else "experts",
    }
    if "lora" in case:
        repair["lora_rank"] = 8
    detect = {"max_new_tokens": LENGTH}  # as long as the rows
    source = {"path": "x", "train": "0:1", "test": "1:2"}
    data: dict[str, Any] = {"harmful": source, "benign": source, "borderline": source}
    data["jailbreaks"] = {"path": "x", "seen": ["a"], "unseen": ["b"]}
    tree = {"run": {"name": "x"}, "model": {"name_or_path": "x", "dtype": "bfloat16" if "bf16" in case else "float32"}}
    made = recipe_of({**tree, "data": data, "detect": detect, "repair": repair}, source="x")
    assert isinstance(made, RasaRecipe)
    return made


def rows(number: int, length: int) -> list[TrainingRow]:
    """Half of them to retain. Their lengths differ, and an early response makes logits of almost all positions."""
    texts = [" ".join(f"w{(i * j) % 56}" for j in range(1, length - 5 - i % 3)) for i in range(number)]
    streams: list[Stream] = ["repair", "retain"]
    return [
        TrainingRow(Conversation.of("w1"), Reply.written(text), streams[i % 2], "x") for i, text in enumerate(texts)
    ]


def held(case: set[str], model: Any, made: RasaRecipe) -> TrainableModel:
    backbone = Backbone.of(model)
    trained: TrainableModel
    if "whole" in case:
        trained = WholeModel(backbone)
        engine().shard(trained.reference)
    else:
        trained = SplitModel(backbone, critical(made, backbone), lora_rank=made.repair.lora_rank)
    engine().shard(trained.backbone)
    return trained


def stage(trained: TrainableModel, made: RasaRecipe, length: int) -> None:
    section = made.repair.model_copy(update={"max_length": length})
    with tempfile.TemporaryDirectory() as folder:
        repair_experts(trained, tiny_chat(), rows(8 * ROWS, length), section, Path(folder), seed=0)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(name: str) -> dict[str, Any]:
    case = set(name.split("+"))
    # oneDNN keeps a compiled kernel for every shape of a bf16 product, and rows per expert are never the same twice:
    # hundreds of MiB that no tensor holds and no GPU has.
    torch.backends.mkldnn.set_flags("onednn" in case)
    made = recipe(case)
    dtype = getattr(torch, made.model.dtype)
    stage(held(case, tiny_model("qwen3_moe", dtype=dtype), made), made, 16)
    gc.collect()
    baseline = resident()
    set_seed(0)
    torch.set_default_dtype(dtype)
    model = Qwen3MoeForCausalLM(config())
    torch.set_default_dtype(torch.float32)
    trained = held(case, model, made)
    del model
    gc.collect()
    peak = PeakMemory()
    stage(trained, made, LENGTH)
    measured = peak.read()["peak_memory_mb"] - baseline / MIB

    found = plan(made, planned(made), config(), gpus=world_size())
    # A bucket is reserved whole, and on the CPU only what is written to is resident.
    engines.REDUCE_BUCKET = found.parts.trainable["repair"]
    zero = engine().zero_config
    engines.MAX_LIVE = int(zero.get("stage3_max_live_parameters", engines.MAX_LIVE))
    engines.PREFETCH = int(zero.get("stage3_prefetch_bucket_size", engines.PREFETCH))
    chosen = next(m for m in found.stages(engine().name) if m.stage == "repair")
    parts = chosen.parts()
    if "whole" not in case:
        parts["beside"] = 0  # this stage stands alone
    else:
        sharers = world_size() if engine().capabilities.splits_parameters else 1
        parts["beside"] = found._stock.weights // sharers
    predicted = sum(parts.values()) / MIB
    return {
        "case": name,
        "engine": engine().name,
        "rank": rank(),
        "measured_mib": round(measured),
        "planned_mib": round(predicted),
        "ratio": round(predicted / measured, 3),
        "parts": {key: round(value / MIB) for key, value in parts.items()},
    }


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    engine()
    for case in cases:
        print(json.dumps(run(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
