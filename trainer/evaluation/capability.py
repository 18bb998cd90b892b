"""Did the model keep what it could do? Two metrics on a task's reference answers.

Shape suffixes: B rows, T positions (left-padded), A positions of the longest answer, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.errors import UserError, unknown
from data_prep.schema import Task
from trainer.evaluation.answers import matches, reference
from trainer.evaluation.generation import left_pad, reply, require_room
from trainer.evaluation.metrics import Rate, from_counts, from_flags
from trainer.model.chat import Chat
from trainer.moe.modes import evaluating
from trainer.moe.sharding import is_sharded
from trainer.runtime.console import progress
from trainer.runtime.processes import dealt, from_all_ranks


def score(model: PreTrainedModel, chat: Chat, task: Task, *, max_new_tokens: int, batch_size: int) -> Rate:
    """Score of one task. `exact_match`: share of prompts answered right (`matches`); n = prompts.

    `token_accuracy`: share of reference answer tokens that are the model's first choice given the chat prompt and the
    reference up to there (teacher-forced, no generation); n = answer tokens, padding and prompt not counted.
    Raises `UserError` naming the task for a prompt without answer, an unknown metric, or no prompts at all.
    """
    missing = [prompt.id for prompt in task.prompts if not reference(prompt.answer or "")]
    if missing:
        raise UserError(f"capability task '{task.name}': prompt '{missing[0]}' has no answer ({len(missing)} without)")
    if task.metric == "token_accuracy":
        return _token_accuracy(model, chat, task, batch_size)
    if task.metric != "exact_match":
        raise unknown(f"metric of capability task '{task.name}'", task.metric, ["exact_match", "token_accuracy"])
    asked = [prompt.conversation for prompt in task.prompts]
    label = f"capability {task.name}"
    replies = reply(model, chat, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, label=label)
    pairs = zip(replies, task.prompts, strict=True)
    return from_flags((matches(said.text, cast(str, prompt.answer)) for said, prompt in pairs), name=label)


@torch.no_grad()
def _token_accuracy(model: PreTrainedModel, chat: Chat, task: Task, batch_size: int) -> Rate:
    label = f"capability {task.name}"
    prompts = [chat.opening(prompt.conversation) for prompt in task.prompts]
    answers = [
        chat.tokenizer(cast(str, p.answer).strip(), add_special_tokens=False)["input_ids"] for p in task.prompts
    ]
    rows = [(asked, cast(list[int], answer)) for asked, answer in zip(prompts, answers, strict=True)]
    lengths = [len(asked) + len(answer) for asked, answer in rows]
    require_room(model, lengths, 0, f"data.capability {task.name!r}")
    rows.sort(key=lambda row: len(row[0]) + len(row[1]), reverse=True)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    found: dict[int, tuple[int, int]] = {}
    with evaluating(model):
        for number, batch in progress(dealt(batches, together=is_sharded(model)), label):
            found[number] = _answer_hits(model, batch, chat.padding)
    counts = from_all_ranks(found)
    return from_counts(sum(right for right, _ in counts), sum(total for _, total in counts), name=label)


def _answer_hits(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[int, int]:
    ids_BT, mask_BT = left_pad([asked + answer for asked, answer in batch], pad_id, model.device)
    longest = max(len(answer) for _, answer in batch)
    # Left padding puts every answer at the end, so logits of the whole prompt (and their memory) are never made.
    outputs = cast(Any, model)(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    logits_BAV: Tensor = outputs.logits[:, :-1]
    lengths_B1 = torch.tensor([[len(answer)] for _, answer in batch], device=ids_BT.device)
    counted_BA = torch.arange(longest, 0, -1, device=ids_BT.device).unsqueeze(0) <= lengths_B1
    hits_BA = (logits_BAV.argmax(-1) == ids_BT[:, -longest:]) & counted_BA
    return int(hits_BA.sum()), int(counted_BA.sum())
