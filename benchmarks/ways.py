"""Ways to train some experts of a model, as one step on the same tokens: forward, backward, AdamW.

Every way gets a model of its own and returns the step and what it trains. The floor trains nothing: it is the forward
pass and the gradients of the activations, which no way to train the lowest layer's experts can leave out.

Shapes: T tokens, K chosen experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.setting import Setting
from trainer.moe.backbone import Backbone
from trainer.moe.experts import SplitModel

Step = Callable[[Tensor], None]
Made = tuple[Step, torch.optim.Optimizer | None]
Way = Callable[[PreTrainedModel, Setting], Made]
LEARNING_RATE = 1e-4


def floor(model: PreTrainedModel, setting: Setting) -> Made:
    """Nothing trains; gradients flow back to the embeddings."""
    model.requires_grad_(False)

    def step(ids_BS: Tensor) -> None:
        embedded_BSD = model.get_input_embeddings()(ids_BS).requires_grad_(True)
        model(inputs_embeds=embedded_BSD, labels=ids_BS, use_cache=False).loss.backward()

    return step, None


def full(model: PreTrainedModel, setting: Setting) -> Made:
    """Every parameter."""
    return _steps(model, model.parameters())


def mask(model: PreTrainedModel, setting: Setting) -> Made:
    """The fused expert tensors, with the gradients of the other experts set to zero."""
    backbone = Backbone.of(model)
    chosen = setting.critical(backbone).by_layer()
    model.requires_grad_(False)
    trained = []
    for layer in backbone:
        for parameter in layer.experts.parameters():
            keep_E11 = torch.zeros(layer.num_experts, *[1] * (parameter.ndim - 1), device=parameter.device)
            keep_E11[chosen.get(layer.index, [])] = 1
            parameter.requires_grad_(True).register_hook(lambda grad, keep=keep_E11: grad * keep.to(grad.dtype))
            trained.append(parameter)
    return _steps(model, trained)


def peft(model: PreTrainedModel, setting: Setting) -> Made:
    """PEFT's LoRA on the fused expert tensors: on every expert, there is no choice."""
    adapted = get_peft_model(model, lora_config(setting))
    return _steps(adapted, [p for p in adapted.parameters() if p.requires_grad])


def lora_config(setting: Setting) -> LoraConfig:
    """LoRA on every expert of every layer."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=[], target_parameters=names)


def esft(model: PreTrainedModel, setting: Setting) -> Made:
    """A loop over experts that are modules of their own, as ESFT (arXiv 2407.01906) freezes all but some of."""
    backbone = Backbone.of(model)
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for index, experts in setting.critical(backbone).by_layer().items():
        module: Any = backbone.layer(index).experts
        module.own = nn.ModuleDict()
        for expert in experts:
            weights = {name: nn.Parameter(getattr(module, name)[expert].detach().clone()) for name in NAMES}
            module.own[str(expert)] = nn.ParameterDict(weights)
            trained += weights.values()
    ALL_EXPERTS_FUNCTIONS.register("benchmark_loop", _loop)
    model.set_experts_implementation("benchmark_loop")
    return _steps(model, trained)


NAMES = ("gate_up_proj", "down_proj")


def _loop(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    out_TD = torch.zeros_like(hidden_TD)
    for expert in index_TK.unique().tolist():
        token_S, slot_S = (index_TK == expert).nonzero(as_tuple=True)
        up, down = (_weight(experts, name, expert) for name in NAMES)
        rows_SD = F.linear(experts._apply_gate(F.linear(hidden_TD[token_S], up)), down)
        out_TD = out_TD.index_add(0, token_S, (rows_SD * weights_TK[token_S, slot_S, None]).to(out_TD.dtype))
    return out_TD


def _weight(experts: Any, name: str, expert: int) -> Tensor:
    own = getattr(experts, "own", {})
    weight: Tensor = own[str(expert)][name] if str(expert) in own else getattr(experts, name)[expert]
    return weight


def split(model: PreTrainedModel, setting: Setting) -> Made:
    """Ours: the critical experts as compact parameters."""
    return split_share(setting.share)(model, setting)


def split_share(share: float) -> Way:
    """Ours at another share of critical experts."""

    def way(model: PreTrainedModel, setting: Setting) -> Made:
        backbone = Backbone.of(model)
        return _split(SplitModel(backbone, setting.critical(backbone, share)))

    return way


def split_lora(model: PreTrainedModel, setting: Setting) -> Made:
    """Ours, LoRA on the critical experts."""
    backbone = Backbone.of(model)
    return _split(SplitModel(backbone, setting.critical(backbone), lora_rank=setting.rank))


def _split(made: SplitModel) -> Made:
    made.train_experts()
    return _steps(made.model, made.trainable().values())


def _steps(model: nn.Module, trained: Iterable[nn.Parameter]) -> Made:
    model.train()
    optimiser = torch.optim.AdamW(list(trained), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(ids_BS: Tensor) -> None:
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step, optimiser


WAYS: dict[str, Way] = {
    "floor": floor,
    "full": full,
    "mask": mask,
    "peft": peft,
    "esft": esft,
    "split": split,
    "split_lora": split_lora,
}
