"""What one process of a multi-process test does: `python -m tests.distributed.worker OUT CASE ...` under a launcher.

Every case trains a tiny model with fixed rows; rank 0 writes `<case>.safetensors` (what training may change) and every
rank `<case>-<rank>.json` (losses and what the engine really did).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import set_seed

from data_prep.schema import Conversation, Prompt, Wrapper
from tests.moe.families import FAMILIES
from tests.tiny import tiny_chat, tiny_model
from trainer.detection.counts import count_activations
from trainer.detection.pairs import Pair
from trainer.engines import optimiser_states
from trainer.engines.engine import engine
from trainer.evaluation.generation import reply
from trainer.model.reply import Reply
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.sharding import is_partitioned, size
from trainer.moe.trainable import TrainableModel, WholeModel
from trainer.recipe.sections import AttentionSection, ConsistencySection, ModelSection, RepairSection
from trainer.runtime.processes import from_rank_0, leave, rank, world_size
from trainer.training import loop as watch
from trainer.training.consistency import ConsistencyRow, make_routing_consistent
from trainer.training.repair import TrainingRow, repair_experts
from trainer.training.under_repair import trained_attention, under_repair

STEPS, ROWS_A_STEP = 4, 4
CHOSEN = ((0, 1), (0, 5), (1, 2), (2, 0), (2, 7))
CHAT = tiny_chat()
TOKENIZER = CHAT.tokenizer


def words(seed: int, n: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 56, n))


def said(seed: int, n: int) -> Reply:
    return Reply.written(words(seed, n))


# Lengths differ, so that the ranks' batches differ in shape.
ROWS = [
    TrainingRow(
        Conversation.of(words(i, 3 + i % 7)), said(50 + i, 2 + i % 3), "retain" if i % 3 == 0 else "repair", "x"
    )
    for i in range(24)
]
PAIRS = [
    ConsistencyRow(
        Conversation.of(words(i, 3 + i % 5)),
        Conversation.of(words(20 + i, 5 + i % 4)),
        said(40 + i, 3),
        Conversation.of(words(60 + i, 4 + i % 3)),
        said(i, 3),
    )
    for i in range(24)
]


def trained(
    lora_rank: int | None = None, dtype: torch.dtype = torch.float32, full: bool = False, shared: bool = False
) -> TrainableModel:
    """A split model; with `shared`, one of a family with shared experts, which train too, and attention with them."""
    family = next(family for family in FAMILIES if family.model_type == "qwen2_moe")
    backbone = Backbone.of(family.build().to(dtype) if shared else tiny_model(dtype=dtype)).check()
    model: TrainableModel
    if full:
        model = WholeModel(backbone)
        engine().shard(model.reference)
    else:
        members = tuple(Member(*pair) for pair in CHOSEN)
        set_seed(0)
        experts = ExpertSet(members, {layer.index: layer.num_experts for layer in backbone})
        if shared:
            experts = experts.with_shared(backbone.shared_layers)
        # It has no bias. Those of the others have tiny gradients, and AdamW steps by what rounding left of them.
        attention = AttentionSection(projections=["o_proj"]) if shared else None
        section = RepairSection(lora_rank=lora_rank, attention=attention)
        model = under_repair(backbone, experts, section)
    engine().shard(model.backbone)
    return model


def loaded(folder: Path) -> TrainableModel:
    """A split model read from disk as a run reads it: head tied, shared experts and some of attention train too."""
    checkpoint = folder / "checkpoint"
    if rank() == 0:
        model = next(family for family in FAMILIES if family.model_type == "qwen2_moe").build()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.generation_config.max_new_tokens = 7
        model.save_pretrained(checkpoint)
        TOKENIZER.save_pretrained(checkpoint)
    from_rank_0(None)
    backbone, _ = engine().load(ModelSection(name_or_path=str(checkpoint)))
    assert backbone.model.generation_config.max_new_tokens == 7
    members = tuple(Member(*pair) for pair in CHOSEN)
    set_seed(0)
    experts = ExpertSet(members, {layer.index: layer.num_experts for layer in backbone})
    section = RepairSection(lora_rank=4, attention=AttentionSection(layers=[0, 2], projections=["q_proj", "o_proj"]))
    attention = trained_attention(backbone, section).values()
    engine().make_real(parameter for module in attention for parameter in module.parameters())
    model = under_repair(backbone, experts.with_shared(backbone.shared_layers), section)
    engine().shard(model.backbone)
    return model


def arguments(accumulation: int = 1, **more: Any) -> dict[str, Any]:
    rows = ROWS_A_STEP // (world_size() * accumulation)
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "warmup_steps": 0,
        **more,
    }


def repair(model: TrainableModel, folder: Path, **keys: Any) -> list[dict[str, float]]:
    return repair_experts(model, CHAT, ROWS, RepairSection(**arguments(**keys)), folder, seed=0).log


def consistency(model: TrainableModel, folder: Path, **keys: Any) -> list[dict[str, float]]:
    section = ConsistencySection(**arguments(**keys))
    return make_routing_consistent(model, CHAT, PAIRS, section, folder, seed=0).log


def case_full(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained()
    return model, repair(model, folder) + consistency(model, folder)


def case_lora(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(lora_rank=4)
    return model, repair(model, folder)


def case_gates(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained()
    return model, repair(model, folder, train_gates=True, routing="replay")


def case_accumulation(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained()
    return model, repair(model, folder, accumulation=2, gradient_checkpointing=True)


def case_checkpointing(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained()
    more = {"gradient_checkpointing": True}
    return model, repair(model, folder, **more) + consistency(model, folder, **more)


def case_bf16(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(dtype=torch.bfloat16)
    return model, repair(model, folder, train_gates=True) + consistency(model, folder)


def case_shared(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(lora_rank=4, shared=True)
    return model, repair(model, folder, gradient_checkpointing=True) + consistency(model, folder)


def case_shared_bf16(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(dtype=torch.bfloat16, shared=True)
    return model, repair(model, folder)


def case_loaded(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = loaded(folder)
    return model, repair(model, folder, retain_loss="kl") + consistency(model, folder)


def case_whole(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(full=True)
    return model, repair(model, folder)


def case_whole_bf16(folder: Path) -> tuple[TrainableModel, list[dict[str, float]]]:
    model = trained(full=True, dtype=torch.bfloat16)
    return model, repair(model, folder) + consistency(model, folder)


def inference(out: Path) -> None:
    """Activation counts and replies, whose batches are dealt to the processes."""
    backbone = Backbone.of(tiny_model()).check()
    engine().shard(backbone)
    goals = [Prompt(f"g{i}", Conversation.of(words(i, 3 + i % 5)), "harmful") for i in range(11)]
    wrapper = Wrapper("w", "family", "seen", "w1 {prompt} w2", "{prompt}")
    pairs = [Pair(goal, wrapper, said(100 + i, 3), said(200 + i, 2 + i % 3)) for i, goal in enumerate(goals)]
    counts = count_activations(backbone, CHAT, pairs, "both", batch_size=2)
    prompts = [goal.conversation for goal in goals]
    replies = reply(backbone.model, CHAT, prompts, max_new_tokens=5, batch_size=2, label="replies")
    found = {
        "hits": counts.adversarial.hits_PLE.tolist(),
        "anchor": counts.anchor.hits_PLE.tolist(),
        "tokens": counts.adversarial.tokens_P.tolist(),
        "replies": [[said.text, said.ids, said.finished] for said in replies],
    }
    (out / f"inference-{rank()}.json").write_text(json.dumps(found))


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    engine()
    proofs: list[dict[str, Any]] = []
    release = watch.release

    def prove(trainer: Any) -> None:
        state = optimiser_states.read(trainer) if trainer.optimizer is not None else {}
        moments = [t for name, t in state.items() if not name.endswith(("/master", "/step"))]
        parameters = list(trainer.trained.model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        proofs.append(
            {
                "engine": engine().name,
                "wrapped": type(trainer.model_wrapped).__name__,
                "zero_stage": trainer.deepspeed.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
                "partitioned": all(is_partitioned(p) for p in parameters),
                "dtensors": all(isinstance(p, DTensor) for p in parameters),
                "moment_bytes": sum(t.numel() * t.element_size() for t in moments),
                "trainable_bytes": sum(size(p) * p.element_size() for p in trainable),
            }
        )
        release(trainer)

    watch.release = prove
    for name in cases:
        if name == "inference":
            inference(out)
            continue
        proofs.clear()
        model, log = globals()[f"case_{name}"](out / name)
        state, stock = model.state_dict(), {n: t.cpu().clone() for n, t in model.stock_state()}
        losses = [entry["loss"] for entry in log if "loss" in entry]
        (out / f"{name}-{rank()}.json").write_text(json.dumps({"losses": losses, "proofs": proofs}))
        if rank() == 0:
            save_file({k: v.contiguous() for k, v in state.items()}, out / f"{name}.safetensors")
            save_file({k: v.contiguous() for k, v in stock.items()}, out / f"{name}-stock.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
