"""Training the output calibration on cached states; kept where held-out replies become more likely.

Shapes: T reply tokens, A axes, H last hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_prep.errors import UserError
from trainer.methods.alignx.head.bank import Bank
from trainer.methods.alignx.head.evidence import Evidence, gain, verdict
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.head.output import Output
from trainer.methods.alignx.head.outputs import Outputs
from trainer.methods.alignx.head.split import split
from trainer.methods.alignx.head_section import HeadSection
from trainer.runtime.console import say


def fit_output(
    head: MoCaE, bank: Bank, outputs: Outputs, lm_head_VH: Tensor, section: HeadSection, seed: int
) -> Evidence | None:
    """Give a fitted head its output calibration, if the held-out replies speak for it; None where it is switched off.

    The split is that of `fit` with the same bank, section and seed: replies of held-out prompts train nothing.

    Raises:
        UserError: outputs of rows that the bank does not have, of other axes, or of one part of the bank alone.
    """
    head.output = None
    if section.output == "off":
        return None
    _check(bank, outputs, lm_head_VH)
    parts = split(bank, section.held_out, seed)
    mixed_TH = _mixed(head, bank, outputs)
    is_held_T = torch.isin(outputs.row_T, parts.held_R)
    for name, some in (("fitting", ~is_held_T), ("held-out", is_held_T)):
        if not some.any():
            raise UserError(f"outputs: found no token of a {name} prompt; allowed: replies to prompts of both parts")
    trained = _train(mixed_TH[~is_held_T], outputs.targets_T[~is_held_T], lm_head_VH, section, seed)
    held_TH, targets_T = mixed_TH[is_held_T], outputs.targets_T[is_held_T]
    groups_T = [bank.groups_N[row] for row in outputs.row_T[is_held_T].tolist()]
    before_T = _losses(held_TH, targets_T, lm_head_VH, None, section)
    after_T = _losses(held_TH, targets_T, lm_head_VH, trained, section)
    found = verdict({"the plain mixture": gain(before_T, after_T, groups_T)}, section.output)
    say(f"head: output {'kept' if found.kept else 'left out'}: {found.reason}")
    if found.kept:
        head.output = trained.eval()
    return found


def _check(bank: Bank, outputs: Outputs, lm_head_VH: Tensor) -> None:
    axes, hidden = outputs.hidden_TAH.shape[1:]
    if axes != len(bank.axes) or hidden != lm_head_VH.shape[1]:
        raise UserError(
            f"outputs: found states of {axes} axes and hidden size {hidden}; allowed: {len(bank.axes)} and "
            f"{lm_head_VH.shape[1]}"
        )
    if not bool(((outputs.row_T >= 0) & (outputs.row_T < len(bank.labels_N))).all()):
        raise UserError(
            f"outputs: rows: found {int(outputs.row_T.min())} to {int(outputs.row_T.max())}; allowed: 0 to "
            f"{len(bank.labels_N) - 1}, the rows of the bank"
        )
    if not bool(((outputs.targets_T >= 0) & (outputs.targets_T < len(lm_head_VH))).all()):
        raise UserError(f"outputs: targets: allowed: 0 to {len(lm_head_VH) - 1}, the vocabulary")


def _mixed(head: MoCaE, bank: Bank, outputs: Outputs) -> Tensor:
    alpha_NA = head.alpha(bank.features_NVD)
    return torch.einsum("ta,tah->th", alpha_NA[outputs.row_T], outputs.hidden_TAH.float())


def _train(mixed_TH: Tensor, targets_T: Tensor, lm_head_VH: Tensor, section: HeadSection, seed: int) -> Output:
    generator = torch.Generator().manual_seed(seed)
    made = Output.drawn(mixed_TH.shape[1], section.latent, generator)
    lm_head_VH = lm_head_VH.detach().float()
    optimizer = torch.optim.AdamW(
        made.parameters(), lr=section.output_learning_rate, weight_decay=section.weight_decay
    )
    for _ in range(section.output_epochs):
        for some in torch.randperm(len(mixed_TH), generator=generator).split(section.output_batch_size):
            optimizer.zero_grad()
            cross_entropy(made(mixed_TH[some]) @ lm_head_VH.T, targets_T[some]).backward()
            optimizer.step()
    return made


@torch.no_grad()
def _losses(
    mixed_TH: Tensor, targets_T: Tensor, lm_head_VH: Tensor, output: Output | None, section: HeadSection
) -> Tensor:
    found = []
    for y_TH, some_T in zip(
        mixed_TH.split(section.output_batch_size), targets_T.split(section.output_batch_size), strict=True
    ):
        read_TH = y_TH if output is None else output(y_TH)
        found.append(cross_entropy(read_TH @ lm_head_VH.float().T, some_T, reduction="none"))
    return torch.cat(found).double()
