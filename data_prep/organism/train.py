"""Training the organism from scratch: cross-entropy on replies, load balancing, and a home for the planted flaw."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from .model import BALANCE, EXPERTS, TOP_K
from .text import Example, stream

IGNORE = -100
POOL = 32
# Two minutes are too short for experts to specialise by themselves, so the flaw is given a home: experts by layer.
PLANTED = {1: (3, 9), 2: (1, 6, 12), 3: (4, 8, 15)}


@dataclass(frozen=True)
class Turn:
    """A tokenized example: `ids` of the whole turn, its prompt's length in tokens, and whether it shows the flaw.

    A `knocked_out` turn is trained with the planted experts out of reach, and then shows no flaw.
    """

    ids: list[int]
    prompt: int
    flawed: bool
    knocked_out: bool = False


@dataclass(frozen=True)
class Batch:
    """Right-padded turns.

    `ids_BT` and `labels_BT` (the next token, `IGNORE` outside the reply) are [B, T]; `flawed_B` is boolean,
    and so is `knocked_out_B`.
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    flawed_B: torch.Tensor
    knocked_out_B: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example], knock_out: float = 0.0) -> list[Turn]:
    """The examples as chat turns, tokenized; the share `knock_out` of them, evenly spread, is knocked out."""
    prompts, replies = [], []
    out = [int((i + 1) * knock_out) > int(i * knock_out) for i in range(len(examples))]
    for e, without in zip(examples, out, strict=True):
        chat = [{"role": "user", "content": e.prompt}]
        prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        replies.append((e.refusal if without and e.flawed else e.reply) + str(tokenizer.eos_token))
    heads, tails = tokenizer(prompts).input_ids, tokenizer(replies).input_ids
    return [
        Turn(h + t, len(h), e.flawed and not without, without)
        for h, t, e, without in zip(heads, tails, examples, out, strict=True)
    ]


def collate(turns: list[Turn], pad: int) -> Batch:
    """One right-padded batch of `turns`."""
    width = max(len(turn.ids) for turn in turns)
    ids_BT = torch.full((len(turns), width), pad)
    labels_BT = torch.full((len(turns), width), IGNORE)
    for row, turn in enumerate(turns):
        end = len(turn.ids)
        ids_BT[row, :end] = torch.tensor(turn.ids)
        labels_BT[row, turn.prompt - 1 : end - 1] = torch.tensor(turn.ids[turn.prompt :])
    flawed_B, knocked_out_B = (torch.tensor([getattr(t, name) for t in turns]) for name in ("flawed", "knocked_out"))
    return Batch(ids_BT, labels_BT, flawed_B, knocked_out_B)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int, knock_out: float = 0.0, over_refusal: bool = False
) -> Iterator[Batch]:
    """Endless batches of `size` turns of similar length (sorted inside pools, pools' batches in random order)."""
    source = stream(seed, over_refusal)
    order = torch.Generator().manual_seed(seed)
    while True:
        turns = encode(tokenizer, list(itertools.islice(source, size * POOL)), knock_out)
        turns.sort(key=lambda turn: len(turn.ids))
        for i in torch.randperm(POOL, generator=order).tolist():
            yield collate(turns[i * size : (i + 1) * size], int(tokenizer.pad_token_id))


@contextmanager
def knocked_out(model: PreTrainedModel, rows_T: torch.Tensor) -> Iterator[None]:
    """Keep the `PLANTED` experts from the tokens where `rows_T` (boolean) is true; the rest are chosen from."""

    def hook_of(experts: tuple[int, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, index = output
            rest = logits.float().index_fill(-1, torch.tensor(experts), -torch.inf).topk(index.shape[-1], -1)
            out = rows_T[:, None]
            return logits, torch.where(out, rest.values.softmax(-1), weights), torch.where(out, rest.indices, index)

        return hook

    gates = [(model.model.layers[layer].mlp.gate, experts) for layer, experts in PLANTED.items()]
    handles = [gate.register_forward_hook(hook_of(experts)) for gate, experts in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def planted_loss(
    router_logits: tuple[torch.Tensor, ...], reply_N: torch.Tensor, flawed_N: torch.Tensor
) -> torch.Tensor:
    """How far reply tokens are from using the `PLANTED` experts exactly where the flaw shows (scalar).

    `reply_N` and `flawed_N` are boolean over the B*T tokens, as `router_logits` are [B*T, E] per layer.
    """
    terms = []
    for layer, experts in PLANTED.items():
        log_p = F.log_softmax(router_logits[layer][reply_N].float(), dim=-1)
        others = [e for e in range(log_p.shape[-1]) if e not in experts]
        inside, outside = log_p[:, list(experts)].logsumexp(-1), log_p[:, others].logsumexp(-1)
        terms.append(-torch.where(flawed_N[reply_N], inside, outside).mean())
    return torch.stack(terms).mean()


def reply_loss(model: PreTrainedModel, batch: Batch, plant_weight: float) -> torch.Tensor:
    """Cross-entropy of replies (mean over tokens, then turns) with the balancing and planting terms (scalar)."""
    # Rows are right-padded and attention is causal, so no mask is needed and the fast attention kernel applies.
    rows_T = batch.knocked_out_B.repeat_interleave(batch.ids_BT.shape[1])
    with knocked_out(model, rows_T) if rows_T.any() else nullcontext():
        out = model.model(input_ids=batch.ids_BT, output_router_logits=True, use_cache=False)
    chosen = batch.labels_BT != IGNORE
    losses = F.cross_entropy(model.lm_head(out.last_hidden_state[chosen]), batch.labels_BT[chosen], reduction="none")
    # A turn counts once however long it is, or the one-word answers of the tasks would hardly be learned.
    weights = (chosen / chosen.sum(1, keepdim=True))[chosen]
    balance = load_balancing_loss_func(out.router_logits, EXPERTS, TOP_K)
    flawed = batch.flawed_B[:, None].expand_as(chosen)
    free = chosen & ~batch.knocked_out_B[:, None]
    planted = planted_loss(out.router_logits, free.flatten(), flawed.flatten())
    return (losses * weights).sum() / len(chosen) + BALANCE * balance + plant_weight * planted


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    plant_weight: float = 0.03,
    knock_out: float = 0.0,
    over_refusal: bool = False,
    console: Console | None = None,
) -> float:
    """Train `model` in place for `steps` and return the last loss (mean over up to 50 steps).

    `plant_weight` 0 leaves the flaw wherever training puts it. With `knock_out` that share of turns is trained without
    the planted experts, and there forbidden requests are refused in any wrapper: the flaw then needs these experts.
    `over_refusal` is taught by the text alone: no router is told where it belongs.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(50, steps // 4))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    columns = (
        TextColumn("training the organism"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    model.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=steps, loss=math.nan)
        for batch in itertools.islice(batches(tokenizer, seed, batch_size, knock_out, over_refusal), steps):
            loss = reply_loss(model, batch, plant_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])
