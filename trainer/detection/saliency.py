"""Gradient saliency: which experts would move most if the model were trained to refuse inside the jailbreaks.

Not part of RASA. Activation differences say which experts a jailbreak reaches, not whether changing them can change
the reply; the squared gradient of the repair loss asks that directly. It needs one backward pass over all experts.

A shared expert runs on every token, so counts cannot see it: its activation never differs. Its gradient can be read
like any other's.

Shapes: M batches, L MoE layers, E experts, B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_prep.errors import UserError
from trainer.detection.pairs import Pair
from trainer.engines.table import names
from trainer.model.chat import Batch, Chat, batches
from trainer.moe.backbone import Backbone, expert_tensor_names
from trainer.moe.sharding import is_partitioned, is_sharded, whole
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


class Saliency(NamedTuple):
    """Squared gradient norms of each batch: of the routed experts, and of the shared ones (zero where there is none).

    Layers with fewer experts leave their surplus columns at zero.
    """

    experts_MLE: NDArray[np.float64]
    shared_ML: NDArray[np.float64]


def gradient_saliency(backbone: Backbone, chat: Chat, pairs: Sequence[Pair], batch_size: int) -> Saliency:
    """Squared gradient norm of every expert for each batch of pairs.

    The loss is the repair's: cross-entropy of the anchor's refusal after the jailbroken prompt, response tokens only.

    Raises:
        UserError: a model whose engine runs no backward pass outside of training.
    """
    model = backbone.model.eval().requires_grad_(False)
    asked = [*backbone.expert_parameters().values(), *backbone.shared_parameters().values()]
    if any(is_partitioned(parameter) for parameter in asked):
        able = names(lambda e: e.backward_outside_training)
        raise UserError(
            "detect.score: 'saliency' needs a backward pass outside of training, which this engine does not run; "
            f"allowed: `routealign detect` under another one first ({', '.join(able)}), whose result the run keeps"
        )
    turns = [chat.encode(pair.adversarial_prompt, pair.anchor_reply) for pair in pairs]
    every = list(batches(turns, chat.padding, batch_size))
    found: dict[int, Saliency] = {}
    for parameter in asked:
        parameter.requires_grad_(True)
    try:
        # FSDP2 averages gradients over the processes, so there every process computes every batch.
        shared = list(enumerate(every)) if is_sharded(model) else dealt(every, together=False)
        for number, (_, batch) in progress(shared, "gradient saliency"):
            refusal_loss(backbone, batch.to(model.device)).backward()
            found[number] = _norms(backbone)
            model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
    norms: list[Saliency] = from_all_ranks(found)
    return Saliency(np.stack([n.experts_MLE for n in norms]), np.stack([n.shared_ML for n in norms]))


def _norms(backbone: Backbone) -> Saliency:
    """Of one batch, without the dimension M."""
    norms_LE = np.zeros((len(backbone), max(layer.num_experts for layer in backbone)))
    for i, layer in enumerate(backbone):
        for name in expert_tensor_names(layer.experts):
            gradient = whole(getattr(layer.experts, name).grad)
            norms_LE[i, : layer.num_experts] += gradient.double().flatten(1).square().sum(1).cpu().numpy()
    norms_L = [sum(map(_square, layer.shared_parameters().values())) for layer in backbone]
    return Saliency(norms_LE, np.array(norms_L, dtype=np.float64))


def _square(parameter: torch.nn.Parameter) -> float:
    return 0.0 if parameter.grad is None else whole(parameter.grad).double().square().sum().item()


def refusal_loss(backbone: Backbone, batch: Batch) -> torch.Tensor:
    """Cross-entropy per response token, averaged over each row and then over rows."""
    logits_BSV = backbone.model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits
    loss_BS = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2).float(), batch.input_ids_BS[:, 1:], reduction="none")
    mask_BS = batch.response_BS[:, 1:]
    return ((loss_BS * mask_BS).sum(1) / mask_BS.sum(1).clamp(min=1)).mean()
