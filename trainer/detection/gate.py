"""Fitting the gate of a steering: a linear probe on the last prompt token, on the data of detection.

Shapes: P prompts, D hidden size, B prompts of a batch, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.model.chat import Chat, ChatTurn, batches
from trainer.moe.backbone import Backbone
from trainer.moe.steering_gate import Gate, last_hidden
from trainer.runtime.console import progress

FOLDS = 3
C = 1.0
"""Inverse strength of the probe's L2 penalty, on standardised features."""


def fit_gate(
    backbone: Backbone,
    chat: Chat,
    harmful: Sequence[tuple[str, Conversation]],
    harmless: Sequence[tuple[str, Conversation]],
    batch_size: int,
) -> Gate:
    """A gate that fires on harmful prompts. Each prompt comes as (group, text); a group never lies in two folds.

    Logistic regression on standardised hidden states, classes weighing the same. The layer is the one whose held-out
    balanced accuracy over three folds is best, the earliest of equals.

    Raises:
        UserError: fewer groups of one kind than folds.
    """
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        groups = len({group for group, _ in prompts})
        if groups < FOLDS:
            raise UserError(f"steer.gate: needs {FOLDS} {name} training prompts or more, found {groups}")
    prompts = [*harmful, *harmless]
    labels_P = np.array([1] * len(harmful) + [0] * len(harmless))
    groups_P = np.unique([group for group, _ in prompts], return_inverse=True)[1]
    features = hidden_states(backbone, chat, [asked for _, asked in prompts], batch_size)
    accuracy = {layer: _held_out(x_PD, labels_P, groups_P) for layer, x_PD in features.items()}
    layer = max(accuracy, key=lambda index: (round(accuracy[index], 6), -index))
    weight_D, bias = _fitted(features[layer], labels_P)
    about: dict[str, object] = {
        "held_out_balanced_accuracy": round(accuracy[layer], 4),
        "by_layer": {str(index): round(value, 4) for index, value in accuracy.items()},
        "harmful": len(harmful),
        "harmless": len(harmless),
    }
    return Gate(layer, tuple(float(value) for value in weight_D), bias, about)


def hidden_states(
    backbone: Backbone, chat: Chat, prompts: Sequence[Conversation], batch_size: int
) -> dict[int, NDArray[np.float32]]:
    """What every router reads at the last token of each prompt as a chat, [P, D] by decoder layer."""
    turns = [ChatTurn(ids, len(ids)) for ids in map(chat.opening, prompts)]
    layers = [layer.index for layer in backbone]
    found: dict[int, list[NDArray[np.float32]]] = {index: [] for index in layers}
    order: list[int] = []
    backbone.model.eval()
    for rows, batch in progress(list(batches(turns, chat.padding, batch_size)), "gate: reading prompts"):
        batch = batch.to(backbone.model.device)
        inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.attention_mask_BS}
        for index, hidden_BD in last_hidden(backbone, layers, inputs, batch.attention_mask_BS).items():
            found[index].append(hidden_BD.cpu().numpy())
        order += rows
    return {index: np.concatenate(parts)[np.argsort(order)] for index, parts in found.items()}


def _fitted(x_PD: NDArray[np.float32], labels_P: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """Weights and bias on the raw features, standardisation folded in."""
    scaler, regression = _probe().fit(x_PD, labels_P)
    weight_D = regression.coef_[0] / scaler.scale_
    return weight_D, float(regression.intercept_[0] - weight_D @ scaler.mean_)


def _held_out(x_PD: NDArray[np.float32], labels_P: NDArray[np.int64], groups_P: NDArray[np.int64]) -> float:
    """Balanced accuracy on the folds that a probe, its standardisation included, was not fitted on."""
    guessed_P = cross_val_predict(_probe(), x_PD, labels_P, groups=groups_P, cv=GroupKFold(FOLDS))
    return float(balanced_accuracy_score(labels_P, guessed_P))


def _probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", max_iter=1000))
