"""Training W_r: several gates side by side, on the same batches, each beside its own calibrators' terms.

Shapes: G gates, R rows, F = views x latent size, A axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.methods.alignx.head.losses import gate_loss
from trainer.methods.alignx.head_section import HeadSection


def train_gates(
    f_RF: Tensor, terms_GRA: Tensor, labels_R: Tensor, shares_A: Tensor, section: HeadSection, seed: int
) -> Tensor:
    """W_r of each gate, [G, A, F], from zero with AdamW. `terms_GRA`: logits that are added and not trained."""
    W_GAF = torch.zeros(*terms_GRA.shape[::2], f_RF.shape[1], requires_grad=True)
    if not section.gate:
        return W_GAF.detach()
    optimizer = torch.optim.AdamW([W_GAF], lr=section.learning_rate, weight_decay=section.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(section.epochs):
        for rows_B in torch.randperm(len(f_RF), generator=generator).split(section.batch_size):
            logits_GBA = torch.einsum("bf,gaf->gba", f_RF[rows_B], W_GAF) + terms_GRA[:, rows_B]
            optimizer.zero_grad()
            gate_loss(logits_GBA, labels_R[rows_B], shares_A, section).sum().backward()
            optimizer.step()
    return W_GAF.detach()
