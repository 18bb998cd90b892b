"""The judge "guard": a moderation model, loaded through transformers and asked as its card says.

Shape suffixes: B questions of a batch, T token positions (left-padded), N generated positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.schema import Conversation
from trainer.evaluation.generation import left_pad, positions
from trainer.evaluation.judges.formats import FORMATS, Question
from trainer.evaluation.judges.grade import Grade
from trainer.model.load import read_model
from trainer.model.reply import Reply
from trainer.model.tokenizer import TEMPLATE_ERRORS
from trainer.recipe.judges import GuardSection
from trainer.runtime.console import progress, say
from trainer.runtime.processes import dealt, from_all_ranks


class GuardModel:
    """Grades replies with a model of its own; the model is loaded when it is first asked.

    Every process loads it whole and grades its share.
    """

    def __init__(self, section: GuardSection) -> None:
        self.section = section
        self.format = FORMATS[section.format]

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Grade]:
        """One grade per reply, in their order.

        Raises:
            UserError: a model that cannot be loaded, or whose chat template leaves the reply out.
        """
        asked = [self.format.questions(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        answers = iter(self._answers([question for questions in asked for question in questions]))
        return [self.format.grade([next(answers) for _ in questions]) for questions in asked]

    def _answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes to each; "" where the question is longer than it can read."""
        rows = [self._tokens(question) for question in questions]
        limit = positions(self._model)
        fitting = [i for i, row in enumerate(rows) if limit is None or len(row) + self.format.tokens <= limit]
        if len(fitting) < len(rows):
            say(f"judge: {len(rows) - len(fitting)} questions are longer than {limit} positions, and go unjudged")
        order = sorted(fitting, key=lambda i: len(rows[i]), reverse=True)
        size = self.section.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: dict[int, list[str]] = {}
        for number, batch in progress(dealt(batches, together=False), "judge") if batches else ():
            found[number] = self._generate([rows[i] for i in batch])
        answers = [""] * len(rows)
        for batch, written in zip(batches, from_all_ranks(found), strict=True):
            for i, text in zip(batch, written, strict=True):
                answers[i] = text
        return answers

    @torch.no_grad()
    def _generate(self, rows: Sequence[Sequence[int]]) -> list[str]:
        model, tokenizer = self._model, self._tokenizer
        padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        ids_BT, mask_BT = left_pad(rows, padding, model.device)
        shipped = cast(GenerationConfig, model.generation_config)
        stops = shipped.eos_token_id if shipped.eos_token_id is not None else tokenizer.eos_token_id
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.format.tokens, pad_token_id=padding, eos_token_id=stops
        )
        out_BN = cast(Any, model).generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
        return list(tokenizer.batch_decode(out_BN[:, ids_BT.shape[1] :], skip_special_tokens=True))

    def _tokens(self, question: Question) -> list[int]:
        text = question.text or self._rendered(question)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, question: Question) -> str:
        """The chat template's text. Some take a message's text as a list of parts, which is tried second."""
        reply = question.messages[-1]["content"]
        in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in question.messages]
        said = "leaves the reply out"
        for messages in (question.messages, in_parts):
            try:
                text = str(
                    self._tokenizer.apply_chat_template(
                        cast(Any, messages),
                        tokenize=False,
                        add_generation_prompt=self.format.opened,
                        **question.variables,
                    )
                )
            except TEMPLATE_ERRORS as error:
                said = f"refuses it: {' '.join(str(error).split())[:200] or type(error).__name__}"
                continue
            if reply.strip() in text and "'type': 'text'" not in text:
                return text
        raise UserError(
            f"evaluate.guard.name_or_path: the chat template of {self.section.name_or_path!r} {said}; allowed: a "
            f"model that is asked as {self.section.format} is"
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        section = self.section
        return cast(
            PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(section.name_or_path, revision=section.revision)
        )

    @cached_property
    def _model(self) -> PreTrainedModel:
        section = self.section
        dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
        model = read_model(section.name_or_path, dtype, revision=section.revision)
        return model.to(PartialState().device)
