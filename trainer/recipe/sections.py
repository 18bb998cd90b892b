"""The sections that recipes are made of; a method's recipe says which of them it has.

Every key is declared once, here or beside its method, with its default. A section is passed whole to the room that
acts on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.config import FileName
from data_prep.errors import unknown
from trainer.recipe.errors import at_key
from trainer.recipe.judges import JUDGES, EndpointSection, GuardSection
from trainer.recipe.markers import refuse_empty_marker
from trainer.recipe.section import Count, PerPair, Section, Share, TrainerSection, Weight


class RunSection(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="folder name of the run: letters, digits, '.', '_', '-'",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything that is drawn")
    output_dir: str = Field(
        "runs",
        min_length=1,
        max_length=3000,
        pattern=r"^[^~\x00-\x1f\x7f][^\x00-\x1f\x7f]*$",
        description="a path without control characters, not from ~ on; the run folder is <output_dir>/<name>",
    )


class ModelSection(Section):
    name_or_path: FileName = Field(min_length=1, description="Hub id or local folder")
    revision: str | None = Field(None, description="Hub branch, tag or commit")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="auto: as the checkpoint says"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="hold the frozen layers in bitsandbytes' NF4 or 8-bit blocks; null: as they are"
    )
    trust_remote_code: bool = Field(False, description="run the modelling code that comes with the checkpoint")
    system_prompt: str | None = Field(
        None, description="system turn of every conversation that brings none; null: as the chat template does"
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {}, description="variables of the chat template, such as enable_thinking: false"
    )


class RepliesSection(Section):
    """How detection asks the model, whatever it then looks for."""

    max_new_tokens: Count = Field(24, description="tokens of a generated reply")
    batch_size: Count = Field(32, description="prompts per forward")


class PairsSection(RepliesSection):
    """How detection finds pairs of a plain goal and a jailbreak."""

    max_pairs: Count = Field(256, description="most pairs used")
    tries_per_pair: Annotated[int, Field(ge=1, le=1000)] = Field(
        16, description="jailbreaks asked for each of max_pairs at most, where few succeed"
    )


class DetectSection(PairsSection):
    """Critical experts: what is counted, scored and chosen."""

    tokens: Literal["prompt", "response", "both"] = Field("both", description="positions whose experts are counted")
    score: Literal["aad", "risk_difference", "gate_mass", "saliency"] = Field(
        "aad", description="what experts are ranked by; saliency: the gradient of the repair loss"
    )
    pool: Literal["token", "pair"] = Field("token", description="mean over all tokens, or over pairs of their means")
    top_k: Count | Share = Field(
        0.125, description="number of experts, or share of all routed experts (0 < share < 1)"
    )
    per_layer_cap: Count | None = Field(None, description="most experts chosen in one layer")
    shared_experts: bool = Field(
        False, description="true: the shared expert of every layer with a critical expert joins the set"
    )
    selection: Literal["critical", "random"] = Field(
        "critical", description="random: the control set, matched in number and layer"
    )
    recombined: float = Field(
        0.5, ge=0, lt=1, description="share of pairs in recombined wrappers (made of the seen and robust ones)"
    )
    bootstrap: int = Field(200, ge=0, le=100_000, description="resamples for the stability of the selection; 0: none")


class AttentionSection(Section):
    """Projections of attention (of linear attention, of short convolutions) that train, whole."""

    projections: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="last part of their names in the model, as [q_proj, k_proj]; null: all of them"
    )
    layers: Annotated[list[Annotated[int, Field(ge=0, lt=65536)]], Field(min_length=1)] | Share | None = Field(
        None, description="decoder layers, or a share of them from the lowest on; null: all of them"
    )


class RepairSection(TrainerSection):
    """Training the critical experts, attention or both, and the rows that they are trained on."""

    arguments_class = "SFTConfig"
    trainer_defaults = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "max_length": 512,
    }

    scope: Literal["experts", "attention", "full"] = Field(
        "experts", description="attention: no expert trains; full: full fine-tuning, to compare with"
    )
    attention: AttentionSection | None = Field(
        None, description="what of attention trains, beside the critical experts or (scope: attention) alone"
    )
    lora_rank: Annotated[int, Field(ge=1, le=8192)] | None = Field(
        None, description="LoRA on the critical experts; null: their full weights"
    )
    lora_alpha: float | None = Field(None, gt=0, le=1e6, description="LoRA scale; null: twice the rank")
    routing: Literal["frozen", "replay"] = Field(
        "frozen", description="replay: the original model's choice of experts is pinned"
    )
    train_gates: bool = Field(False, description="train the routers in this stage too")
    retain_weight: Weight = Field(1.0, description="weight of the retain term; 0: as published")
    retain_loss: Literal["kl", "ce"] = Field("kl", description="kl: to the original model; ce: on its own answers")
    first_token_weight: Weight = Field(0.0, description="extra weight of a reply's first token, where refusing starts")
    recombined: PerPair = Field(1.0, description="rows in fresh recombined wrappers per pair")
    robust: PerPair = Field(0.25, description="rows in wrappers that the model withstands per pair")
    anchors: PerPair = Field(0.25, description="plain harmful rows (the refusal is kept) per pair")
    wrapped_benign: PerPair = Field(1.0, description="harmless rows per wrapper instance that holds a harmful goal")
    plain_benign: PerPair = Field(0.5, description="harmless plain rows per pair")
    borderline: PerPair = Field(0.5, description="plain borderline rows per pair")

    @model_validator(mode="after")
    def _alpha_needs_a_rank(self) -> RepairSection:
        if self.lora_alpha is not None and self.lora_rank is None:
            raise at_key("lora_alpha", f"found {self.lora_alpha}, but lora_rank is not set; set both or neither")
        return self

    @model_validator(mode="after")
    def _scope_has_its_keys(self) -> RepairSection:
        if self.scope == "full" and self.attention is not None:
            raise at_key("attention", "found a section, but scope is full: attention trains with everything else")
        if self.scope == "attention" and self.lora_rank is not None:
            raise at_key("lora_rank", f"found {self.lora_rank}, but scope is attention: no expert trains")
        return self

    @property
    def of_attention(self) -> AttentionSection | None:
        """What of attention trains; None: nothing, or with everything else."""
        return self.attention or (AttentionSection() if self.scope == "attention" else None)


class ConsistencySection(TrainerSection):
    """Training the routers so that a jailbroken prompt routes like its refused plain twin."""

    arguments_class = "TrainingArguments"
    trainer_defaults = {
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
    }

    enabled: bool = Field(True, description="false: the stage is left out of the schedule")
    position: Literal["last_prompt", "response_mean", "response_tokens"] = Field(
        "response_tokens", description="positions whose routing is compared"
    )
    direction: Literal["forward", "reverse", "symmetric"] = Field(
        "forward", description="forward: KL(anchor || adversarial)"
    )
    temperature: float = Field(1.0, gt=0.001, le=1000, description="softmax temperature of both distributions")
    target: Literal["current", "original"] = Field("current", description="model that gives the anchor's routing")
    benign_weight: Weight = Field(1.0, description="weight of keeping the routing of harmless prompts")


class ScheduleSection(Section):
    rounds: int = Field(1, ge=1, le=100, description="how often the order is gone through")
    order: list[Literal["repair", "consistency"]] = Field(
        ["repair", "consistency"], min_length=1, description="stages of one round"
    )

    @model_validator(mode="after")
    def _each_once(self) -> ScheduleSection:
        if len(set(self.order)) < len(self.order):
            raise at_key("order", f"found {self.order}, expected each stage once; schedule.rounds repeats them")
        return self


class EvaluateSection(Section):
    """What is asked of a model, and who judges the replies."""

    max_new_tokens: Count = Field(24, description="tokens of a generated reply")
    batch_size: Count = Field(64, description="prompts per forward")
    judge: str = Field(
        "phrases", description="who judges replies; phrases: offline rules, tuned on English; guard; endpoint"
    )
    guard: GuardSection | None = Field(None, description="a guard model, for judge: guard")
    endpoint: EndpointSection | None = Field(None, description="a served model, for judge: endpoint")
    refusal_markers: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="phrases that mark a refusal; null: the built-in rules"
    )
    wraps_per_benign: Count = Field(2, description="jailbreak wrappers that each harmless test prompt is asked in")

    @field_validator("judge")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in JUDGES:
            raise unknown("judge", name, JUDGES)
        return name

    @model_validator(mode="after")
    def _judge_is_described(self) -> EvaluateSection:
        if self.judge in ("guard", "endpoint") and getattr(self, self.judge) is None:
            raise at_key("judge", f"found {self.judge!r} without a section evaluate.{self.judge}; allowed: with one")
        return self

    @field_validator("refusal_markers")
    @classmethod
    def _telling(cls, markers: list[str] | None) -> list[str] | None:
        for marker in markers or []:
            refuse_empty_marker(marker)
        return markers


class ControlledEvaluateSection(EvaluateSection):
    """With a control beside the method: as many experts, drawn at random."""

    random_control: bool = Field(True, description="also treat a matched random set of experts, to compare with")


class ExportSection(Section):
    model: bool = Field(True, description="keep the stock checkpoint <run>/model; false: only audit it")
    patch: bool = Field(True, description="write patch.safetensors and patch.json, the difference to the base")
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[1-9][0-9]{0,5}(KB|MB|GB)$",
        description="largest weight file where the base cannot be cut as it is (MXFP4, older names): 500MB",
    )
