"""Gradient saliency: which experts would move most if the model were trained to refuse inside the jailbreaks.

Not part of RASA. Activation differences say which experts a jailbreak reaches, not whether changing them can change
the reply; the squared gradient of the repair loss asks that directly. It needs one backward pass over all experts.

Shapes: M batches, L MoE layers, E experts, B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trainer.chat import Batch, batches, encode, pad_id
from trainer.console import progress
from trainer.detection.pairs import Pair
from trainer.moe.backbone import Backbone, expert_tensor_names


def gradient_saliency(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int
) -> NDArray[np.float64]:
    """Squared gradient norm of every expert, [M, L, E], for each batch of pairs.

    The loss is the repair's: cross-entropy of the anchor's refusal after the jailbroken prompt, response tokens only.
    Layers with fewer experts leave their surplus columns at zero.
    """
    turns = [encode(tokenizer, pair.adversarial_prompt, pair.anchor_reply) for pair in pairs]
    model = backbone.model.eval().requires_grad_(False)
    fused = backbone.expert_parameters()
    width = max(layer.num_experts for layer in backbone)
    found: list[NDArray[np.float64]] = []
    for parameter in fused.values():
        parameter.requires_grad_(True)
    try:
        for _, batch in progress(list(batches(turns, pad_id(tokenizer), batch_size)), "gradient saliency"):
            refusal_loss(backbone, batch.to(model.device)).backward()
            norms_LE = np.zeros((len(backbone), width))
            for i, layer in enumerate(backbone):
                for name in expert_tensor_names(layer.experts):
                    gradient = getattr(layer.experts, name).grad
                    norms_LE[i, : layer.num_experts] += gradient.double().flatten(1).square().sum(1).cpu().numpy()
            found.append(norms_LE)
            model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
    return np.stack(found)


def refusal_loss(backbone: Backbone, batch: Batch) -> torch.Tensor:
    """Cross-entropy per response token, averaged over each row and then over rows."""
    logits_BSV = backbone.model(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).logits
    loss_BS = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2).float(), batch.input_ids_BS[:, 1:], reduction="none")
    mask_BS = batch.response_BS[:, 1:]
    return ((loss_BS * mask_BS).sum(1) / mask_BS.sum(1).clamp(min=1)).mean()
