"""The sections of `evaluate` that say which judge grades replies, and how it is reached."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_prep.config import FileName
from trainer.recipe.errors import at_key
from trainer.recipe.section import Count, Section

JUDGES = ("phrases", "guard", "endpoint")
"""Names that `evaluate.judge` may have; `evaluation/judges/judge.py` builds them."""

GuardName = Literal["qwen3guard", "llama-guard", "shieldgemma", "wildguard", "rubric"]


class GuardSection(Section):
    """A model that moderates, loaded here through transformers."""

    name_or_path: FileName = Field(min_length=1, description="Hub id or local folder of the guard model")
    format: GuardName = Field(description="whose prompt and output it speaks; rubric: any chat model")
    revision: str | None = Field(None, description="Hub branch, tag or commit")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="auto: as the checkpoint says"
    )
    batch_size: Count = Field(8, description="replies per forward")


class EndpointSection(Section):
    """A model behind an address that speaks OpenAI's chat completions (vLLM, `transformers serve`, a provider)."""

    url: str = Field(
        pattern=r"^https?://[^\s@]+$", description="address up to and with /v1; no password: see api_key_variable"
    )
    model: str = Field(min_length=1, description="name of the model there")
    format: GuardName = Field("rubric", description="whose prompt and output it speaks; rubric: any chat model")
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = Field(
        None, description="environment variable that holds the key; null: none is sent"
    )
    concurrency: int = Field(8, ge=1, le=256, description="requests at a time")
    seconds: float = Field(60, gt=0, le=3600, description="longest wait for an answer")
    retries: int = Field(4, ge=0, le=20, description="how often a request that failed is sent again")
    budget: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most requests sent, retries counted; what is left is unjudged; null: no limit"
    )
    cache: str | None = Field(
        None, min_length=1, description="file that keeps grades by hash, never a text; null: nothing is kept"
    )

    @model_validator(mode="after")
    def _speaks_chat(self) -> EndpointSection:
        if self.format == "wildguard":
            raise at_key("format", "found 'wildguard', whose prompt is no chat; allowed: evaluate.judge: guard for it")
        return self
