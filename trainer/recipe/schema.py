"""The recipe: one YAML file is one whole run.

Every key is typed, has a default where one makes sense, and can be overridden as `section.key=value`. Relative paths
inside a recipe (a model folder, a data file, `run.output_dir`) are taken from the current directory, not from the
recipe's own folder: recipes are run from the root of a checkout.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.config import DataConfig
from data_prep.errors import UserError
from trainer.recipe.errors import at_key, one_line
from trainer.recipe.steer import SteerSection
from trainer.recipe.trainer_arguments import check_trainer_args
from trainer.recipe.yaml import apply_overrides, dump_yaml, read_yaml

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe. Values are not coerced: YAML already has types, and `"8"` for 8 is most often a slip."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class TrainerSection(Section):
    """A section that also takes any field of a trainer's arguments class, flat beside its own keys."""

    model_config = ConfigDict(extra="allow")
    arguments_class: ClassVar[str]

    @property
    def trainer_args(self) -> dict[str, Any]:
        """The keyword arguments for the trainer's arguments class that the recipe gives."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known_to_the_trainer(self) -> "TrainerSection":
        check_trainer_args(self.arguments_class, self.trainer_args, own=list(type(self).model_fields))
        return self


class RunSection(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="folder name of the run: letters, digits, '.', '_', '-'",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")
    output_dir: str = Field("runs", min_length=1, description="the run folder is <output_dir>/<name>")


class ModelSection(Section):
    name_or_path: str = Field(min_length=1, description="Hub id or local folder")
    revision: str | None = Field(None, description="Hub branch, tag or commit")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="auto: as the checkpoint says"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="hold the frozen layers in bitsandbytes' NF4 or 8-bit blocks; null: as they are"
    )
    trust_remote_code: bool = Field(False, description="run the modelling code that comes with the checkpoint")


class DetectSection(Section):
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
    max_pairs: Count = Field(256, description="most pairs used")
    recombined: float = Field(
        0.5, ge=0, lt=1, description="share of pairs in recombined wrappers (made of the seen and robust ones)"
    )
    max_new_tokens: Count = Field(24, description="tokens of a generated reply")
    batch_size: Count = Field(32, description="prompts per forward")
    bootstrap: int = Field(200, ge=0, description="resamples for the stability of the selection; 0: none")


class RepairSection(TrainerSection):
    arguments_class = "SFTConfig"

    scope: Literal["experts", "full"] = Field("experts", description="full: full fine-tuning, to compare with")
    lora_rank: Count | None = Field(None, description="LoRA on the critical experts; null: their full weights")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA scale; null: as large as the rank")
    routing: Literal["frozen", "replay"] = Field(
        "frozen", description="replay: the original model's choice of experts is pinned"
    )
    train_gates: bool = Field(False, description="train the routers in this stage too")
    retain_weight: Weight = Field(1.0, description="weight of the retain term; 0: as published")
    retain_loss: Literal["kl", "ce"] = Field("kl", description="kl: to the original model; ce: on its own answers")
    first_token_weight: Weight = Field(0.0, description="extra weight of a reply's first token, where refusing starts")
    recombined: Weight = Field(1.0, description="rows in fresh recombined wrappers per pair")
    robust: Weight = Field(0.25, description="rows in wrappers that the model withstands per pair")
    anchors: Weight = Field(0.25, description="plain harmful rows (the refusal is kept) per pair")
    wrapped_benign: Weight = Field(1.0, description="harmless rows per wrapper instance that holds a harmful goal")
    plain_benign: Weight = Field(0.5, description="harmless plain rows per pair")
    borderline: Weight = Field(0.5, description="plain borderline rows per pair")

    @model_validator(mode="after")
    def _alpha_needs_a_rank(self) -> "RepairSection":
        if self.lora_alpha is not None and self.lora_rank is None:
            raise at_key("lora_alpha", f"found {self.lora_alpha}, but lora_rank is not set; set both or neither")
        return self


class ConsistencySection(TrainerSection):
    arguments_class = "TrainingArguments"

    enabled: bool = Field(True, description="false: the stage is left out of the schedule")
    position: Literal["last_prompt", "response_mean", "response_tokens"] = Field(
        "response_tokens", description="positions whose routing is compared"
    )
    direction: Literal["forward", "reverse", "symmetric"] = Field(
        "forward", description="forward: KL(anchor || adversarial)"
    )
    temperature: float = Field(1.0, gt=0, description="softmax temperature of both distributions")
    target: Literal["current", "original"] = Field("current", description="model that gives the anchor's routing")
    benign_weight: Weight = Field(1.0, description="weight of keeping the routing of harmless prompts")


class ScheduleSection(Section):
    rounds: Count = Field(1, description="how often the order is gone through")
    order: list[Literal["repair", "consistency"]] = Field(
        ["repair", "consistency"], min_length=1, description="stages of one round"
    )

    @model_validator(mode="after")
    def _each_once(self) -> "ScheduleSection":
        if len(set(self.order)) < len(self.order):
            raise at_key("order", f"found {self.order}, expected each stage once; schedule.rounds repeats them")
        return self


class EvaluateSection(Section):
    max_new_tokens: Count = Field(24, description="tokens of a generated reply")
    batch_size: Count = Field(64, description="prompts per forward")
    refusal_markers: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="phrases that mark a refusal; null: the built-in list"
    )
    wraps_per_benign: Count = Field(2, description="jailbreak wrappers that each harmless test prompt is asked in")
    random_control: bool = Field(True, description="also repair a matched random set of experts, to compare with")
    steering_baseline: bool = Field(
        False, description="also measure the original model steered as section steer says, to compare with"
    )


class ExportSection(Section):
    model: bool = Field(True, description="keep the stock checkpoint <run>/model; false: only audit it")
    patch: bool = Field(True, description="write patch.safetensors and patch.json, the difference to the base")
    max_shard_size: str = Field(
        "5GB", pattern=r"^[1-9][0-9]*(KB|MB|GB)$", description="largest weight file of the checkpoint: 500MB, 5GB"
    )


class Recipe(Section):
    """A whole run. `Recipe.load` reads it from a file; constructing one checks it just as strictly."""

    method: Literal["rasa", "steermoe"] = Field("rasa", description="which seed system the run follows")
    run: RunSection
    model: ModelSection
    data: DataConfig
    detect: DetectSection = Field(default_factory=DetectSection)
    repair: RepairSection = Field(default_factory=RepairSection)
    consistency: ConsistencySection = Field(default_factory=ConsistencySection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    steer: SteerSection = Field(default_factory=SteerSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_left_out(cls, tree: Any) -> Any:
        # `repair:` with every key commented out reads as null.
        return {key: value for key, value in tree.items() if value is not None} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _fits_quantised_layers(self) -> "Recipe":
        if self.model.quantization is not None and self.method == "rasa":
            check_quantised(self)
        return self

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and put `section.key=value` overrides over it.

        `UserError`: one line that names the key, what was found and what is allowed, or the file and line that is not
        YAML. `OSError` where the file cannot be read.
        """
        tree = read_yaml(path)
        overridden = apply_overrides(tree, overrides)
        return cls.of(tree, source=str(path), overridden=overridden)

    @classmethod
    def of(cls, tree: dict[str, Any], *, source: str, overridden: Sequence[tuple[str, ...]] = ()) -> "Recipe":
        """Check a plain dict; `source` begins the line of an error, except for keys in `overridden`."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(one_line(error, cls, source, overridden)) from error

    @property
    def folder(self) -> Path:
        """The run folder, `<output_dir>/<name>`."""
        return Path(self.run.output_dir) / self.run.name

    def tree(self) -> dict[str, Any]:
        """Every section with every key as plain JSON values, defaults filled in, trainer arguments flat."""
        return self.model_dump(mode="json")

    def resolved_yaml(self) -> str:
        """The recipe with every default filled in; loads to an equal recipe."""
        return dump_yaml(self.tree())

    def hash(self, *sections: str) -> str:
        """Hex sha256 over the canonical JSON of these sections or keys (`"data"`, `"run.seed"`); of all by default.

        `KeyError` for a name that the recipe does not have.
        """
        tree = self.tree()
        chosen = {name: _at(tree, name) for name in sections} if sections else tree
        canonical = json.dumps(chosen, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def check_quantised(recipe: Recipe) -> None:
    """Refuse what needs the gradient of a frozen tensor, or would keep every dequantised one in memory."""
    if recipe.repair.scope == "full":
        raise at_key("repair.scope", "found 'full', which trains every layer; quantised ones cannot be trained")
    if recipe.detect.score == "saliency":
        allowed = "aad, risk_difference, gate_mass"
        raise at_key(
            "detect.score", f"found 'saliency', which needs gradients of quantised tensors; allowed: {allowed}"
        )
    for name in dict.fromkeys(recipe.schedule.order):
        section: RepairSection | ConsistencySection = getattr(recipe, name)
        runs = name == "repair" or recipe.consistency.enabled
        given = [section.trainer_args.get(key) for key in ("gradient_checkpointing", "activation_checkpointing")]
        if runs and not any(given):
            raise at_key(
                f"{name}.gradient_checkpointing",
                "expected true under model.quantization: the backward pass would wait with every layer dequantised",
            )


def check_shared_experts(recipe: Recipe, model_type: str, layers: Collection[int]) -> None:
    """Refuse an edit of shared experts on a model that has none; `layers` are those that have one.

    `UserError` names the key and the model's type.
    """
    if recipe.detect.shared_experts and not layers:
        raise UserError(f"detect.shared_experts: found true, but {model_type} has no shared experts; allowed: false")


def _at(tree: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
