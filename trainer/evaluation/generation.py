"""Greedy replies of a chat model, batched by length.

Shape suffixes: B rows of a batch, T token positions (prompt, left-padded), N generated positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.model.chat import Chat
from trainer.model.reply import Reply
from trainer.moe.modes import evaluating
from trainer.moe.sharding import is_sharded
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(ids_BT, mask_BT)` of rows padded on the left to the longest; the mask is 1 on real tokens. int64 both."""
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BT[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask_BT[index, width - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    chat: Chat,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    key: str = "evaluate.max_new_tokens",
) -> list[Reply]:
    """Greedy reply to each prompt, in the order given.

    The longest prompts go first, so that lack of memory shows at once. Batches are dealt to the processes whole, so
    that a reply does not depend on their number; every process returns all replies. `label` names the progress bar,
    `key` the user's setting that `max_new_tokens` is.
    Raises `UserError` for prompts that leave no room for `max_new_tokens`, and as `Chat.opening`.
    """
    if max_new_tokens < 1:
        raise UserError(f"{key}: found {max_new_tokens}; allowed: 1 or more")
    rows = [chat.opening(prompt) for prompt in prompts]
    require_room(model, [len(row) for row in rows], max_new_tokens, key)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    together = is_sharded(model)
    found: dict[int, list[Reply]] = {}
    with evaluating(model), _only_greedy(model, chat, max_new_tokens) as config:
        for number, batch in progress(dealt(batches, together=together), label) if rows else ():
            ids_BT, mask_BT = left_pad([rows[index] for index in batch], chat.padding, model.device)
            generate = cast(Any, model).generate
            out_BTN: Tensor = generate(
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, synced_gpus=together
            )
            generated = zip(out_BTN[:, ids_BT.shape[1] :].tolist(), batch, strict=True)
            found[number] = [chat.reply(row, prompts[index]) for row, index in generated]
    replies: dict[int, Reply] = {}
    for batch, made in zip(batches, from_all_ranks(found), strict=True):
        replies.update(zip(batch, made, strict=True))
    return [replies[index] for index in range(len(rows))]


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a prompt and its reply may have together, where the model has a limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def require_room(model: PreTrainedModel, lengths: Sequence[int], new_tokens: int, key: str) -> None:
    """`UserError`, which names `key`, where a prompt of `lengths` tokens and `new_tokens` exceed the positions."""
    limit = positions(model)
    too_long = [index for index, length in enumerate(lengths) if limit is not None and length + new_tokens > limit]
    if too_long:
        first = too_long[0]
        raise UserError(
            f"{key}: {len(too_long)} of {len(lengths)} prompts leave no room for {new_tokens} new tokens in the "
            f"model's {limit} positions; the first is prompt {first} (0-based) with {lengths[first]} tokens"
        )


@contextmanager
def _only_greedy(model: PreTrainedModel, chat: Chat, max_new_tokens: int) -> Iterator[GenerationConfig]:
    # `generate` fills what a config leaves open from the checkpoint's own defaults (temperature, repetition penalty),
    # which would warn or bend greedy decoding; so those defaults are put aside meanwhile.
    shipped = cast(GenerationConfig, model.generation_config)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=chat.padding,
        bos_token_id=shipped.bos_token_id,
        eos_token_id=list(chat.stops) or None,
    )
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = shipped
