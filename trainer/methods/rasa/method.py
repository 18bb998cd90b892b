"""RASA: routing-aware safety alignment of Mixture-of-Experts models (arXiv 2602.04448).

    1. Identify the safety-critical experts: activated more by successful jailbreaks than by the same goals, refused.
    2. Repair those experts alone, everything else frozen.
    3. Train the routers alone, so that a jailbroken prompt routes like its refused twin.
    Alternate 2 and 3: min over the router of L_router, at the experts that minimise L_SFT under that router.

Where we differ from the paper, and why, stands in docs/rasa.md; `recipes/*/rasa-faithful.yaml` is the paper's setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed

from data_prep.schema import Wrapper
from data_prep.wrappers import recombine
from trainer.detection.counts import Counts, count_activations
from trainer.detection.critical import scoring, select, topic_control
from trainer.detection.pairs import PairReport, build_pairs
from trainer.detection.selection import resolve_k
from trainer.model.describe import description, would_train
from trainer.moe.expert_set import ExpertSet
from trainer.moe.experts import SplitModel
from trainer.moe.trainable import Trained, WholeModel
from trainer.pipeline.experiment import Subject
from trainer.pipeline.measure import diagnose, export_and_audit, measure, print_summary, random_control
from trainer.pipeline.steer import steering_baseline
from trainer.recipe.schema import Recipe
from trainer.reporting import html, plots
from trainer.run.folder import Run, Stage
from trainer.runtime.console import is_main_process, say
from trainer.runtime.files import atomic_write, replacing, save_tensors
from trainer.training import resume as checkpoint
from trainer.training.consistency import ConsistencyOptions, make_routing_consistent
from trainer.training.loop import StageResult
from trainer.training.repair import RepairOptions, Row, repair_experts
from trainer.training.rows import Mix, Target, consistency_rows, repair_rows

MOVED = (
    "experts_changed",
    "experts_total",
    "shared_experts_changed",
    "gate_weights_changed",
    "untouched_identical",
)
"""Figures of the audit that stand in `evaluation.json`, too."""


def run(recipe: Recipe, run: Run) -> None:
    """The whole method, from the base model to the repaired checkpoint and its evidence."""
    subject = Subject.of(recipe)
    plan = would_train(description(subject.model, subject.backbone), recipe)
    say(
        f"preflight: {subject.model.config.model_type}, {len(subject.backbone)} MoE layers; trains {plan['experts']} "
        f"of {plan['of_experts']} experts, {plan['parameters']:,} of {plan['of_parameters']:,} parameters"
    )
    identified = identify(subject, run)
    before, measured = measure(run, "evaluate-before", subject)
    steered = steering_baseline(run, subject, [measured]) if recipe.evaluate.steering_baseline else {}
    training, last = alternate(subject, identified, run)
    subject = training.subject
    after, measured = measure(run, "evaluate-after", subject, [last])
    diagnostics = diagnose(run, subject, training.trained, after, training.texts, [last, measured])
    audit = export_and_audit(run, subject, training.trained, training.may_move, [last])
    control = {}
    if recipe.evaluate.random_control and recipe.repair.scope == "experts":
        control = random_control(
            run, subject, training.experts, training.elsewhere, training.inputs("control"), [last]
        )
    diagnostics |= {key: audit[key] for key in MOVED} | {"random_control": control, "steering_baseline": steered}
    evaluation = {"before": before, "after": after, "diagnostics": diagnostics}
    if is_main_process():
        atomic_write(run.dir / "evaluation.json", json.dumps(evaluation, indent=1))
        print_summary(evaluation, recipe)
        say(f"report: {html.write(run.dir)}")


def detect(recipe: Recipe, run: Run) -> None:
    """Step 1 alone: up to the expert set, with the activations and the heat map."""
    identified = identify(Subject.of(recipe), run)
    say(f"{len(identified.experts)} of {identified.experts.total} experts: {run.dir / 'expert_set.json'}")


def export(recipe: Recipe, run: Run) -> None:
    """Write the checkpoint of a run again, training what is not trained yet."""
    subject = Subject.of(recipe)
    training, last = alternate(subject, identify(subject, run), run)
    export_and_audit(run, training.subject, training.trained, training.may_move, [last])
    say(f"checkpoint: {run.dir / 'model'}")


# --- 1. identification ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Identified:
    """The critical experts, the jailbreaks that showed them and the refusals they should have met."""

    experts: ExpertSet
    targets: list[Target]
    refusals: dict[str, str]
    stage: Stage


def identify(subject: Subject, run: Run) -> Identified:
    """Pairs, activation counts, scores, top-K. Kept in the run folder; adversarial replies are not."""
    recipe = subject.recipe
    sizes = [layer.num_experts for layer in subject.backbone]
    k = resolve_k(recipe.detect.top_k, sum(sizes), recipe.detect.per_layer_cap, len(sizes))
    stage = run.stage("detect", subject.hash("detect", "evaluate.refusal_markers"))
    files = [run.dir / name for name in ("pairs.jsonl", "activations.parquet", "expert_set.json", "expert_set.png")]
    wrappers = jailbreaks(subject)
    if not stage.done:
        found = build_pairs(
            subject.corpus.harmful.train,
            wrappers,
            subject.replies_of(subject.model),
            subject.judge,
            recipe.detect.max_pairs,
        )
        counts = count_activations(
            subject.backbone, subject.tokenizer, found.pairs, recipe.detect.tokens, recipe.detect.batch_size
        )
        scores = scoring(subject.backbone, subject.tokenizer, found.pairs, counts, recipe.detect)
        experts = select(scores, counts, k, recipe.detect, recipe.run.seed)
        control = topic_control(subject.backbone, subject.tokenizer, found.pairs, counts, experts, recipe.detect)
        about: dict[str, object] = {
            "score": recipe.detect.score,
            "tokens": recipe.detect.tokens,
            "topic_control": control._asdict(),
        }
        if scores.shared:
            about["shared_experts"] = scores.shared
        experts = replace(experts, model=recipe.model.name_or_path, about=experts.about | about)
        if recipe.detect.shared_experts:
            experts = experts.with_shared(subject.backbone.shared_layers)
        if is_main_process():
            _write_detection(files, found, counts, scores.all(), experts)
        also = f" and the shared experts of {len(experts.shared)} layers" if experts.shared else ""
        say(
            f"detect: {len(found.pairs)} pairs kept; {len(experts)} of {experts.total} experts{also} selected; their "
            f"mean activation difference is {control.difference:.3f}, with equal replies "
            f"{control.with_equal_replies:.3f}"
        )
        if scores.shared:
            routed = sum(member.score for member in experts) / len(experts)
            mean = sum(scores.shared.values()) / len(scores.shared)
            say(f"detect: mean saliency of a shared expert {mean:.3g}, of a selected one {routed:.3g}")
        stage.finish(files)
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    goals = {goal.id: goal for goal in subject.corpus.harmful.train}
    refusals = {r["goal"]: r["anchor_reply"] for r in rows if r["outcome"] == "anchor_refused"}
    by_id = {wrapper.id: wrapper for wrapper in wrappers}
    kept = [r for r in rows if r["outcome"] == "kept"]
    targets = [Target(goals[r["goal"]], by_id[r["wrapper"]], refusals[r["goal"]]) for r in kept]
    return Identified(ExpertSet.load(files[2]), targets, refusals, stage)


def jailbreaks(subject: Subject) -> list[Wrapper]:
    """The seen wrappers, with recombined ones between them so that these make up their share of the pairs."""
    detect, corpus = subject.recipe.detect, subject.corpus
    seen = corpus.wrappers_of("seen")
    if detect.recombined == 0:
        return seen
    contexts = [prompt.text for prompt in corpus.benign.train]
    places = [int((i + 1) * detect.recombined) > int(i * detect.recombined) for i in range(detect.max_pairs)]
    known = [*seen, *corpus.wrappers_of("robust")]
    made = iter(recombine(known, contexts, sum(places), subject.recipe.run.seed))
    turns = cycle(seen)
    return [next(made if place else turns) for place in places]


def _write_detection(
    files: list[Path], found: PairReport, counts: Counts, scores_LE: NDArray[np.float64], experts: ExpertSet
) -> None:
    pairs, activations, expert_set, heat_map = files
    atomic_write(pairs, found.jsonl())
    frame = counts.frame()
    frame["score"] = np.concatenate([scores_LE[i, :n] for i, n in enumerate(counts.experts)])
    with replacing(activations) as temporary:
        frame.to_parquet(temporary, index=False)
    atomic_write(expert_set, experts.to_json())
    plots.save_heat_map(frame, experts.pairs, heat_map)


# --- 2. and 3. expert repair and routing consistency, alternating ---------------------------------


def alternate(subject: Subject, identified: Identified, run: Run) -> tuple[Training, Stage]:
    """Expert repair and routing consistency in turn; what was done before is taken up."""
    if subject.holds_parts:
        whole = subject.reloaded()  # experts are split out of whole, unquantised tensors
        if subject.recipe.model.quantization is not None:
            subject.model.to("meta")  # the caller still holds it: packed weights would stay beside the new ones
        subject = whole
    training = Training(subject, under_repair(subject, identified.experts), identified)
    last = identified.stage
    for number, (round_, kind) in enumerate(schedule(subject.recipe), start=1):
        last = in_run_folder(run, f"{kind}-{round_}", number, training, kind, last)
    return training, last


def under_repair(subject: Subject, experts: ExpertSet) -> Trained:
    """The model with its critical experts split out, or whole for the full fine-tuning baseline.

    `subject.model` is whole on entry, and held as the engine does afterwards.
    """
    repair = subject.recipe.repair
    if repair.scope == "full":
        whole = WholeModel(subject.backbone)
        subject.engine.shard(whole.reference)
        subject.engine.shard(whole.backbone)
        return whole
    set_seed(subject.recipe.run.seed)  # LoRA starts from drawn weights: the same ones in a resumed run
    split = SplitModel(subject.backbone, experts, lora_rank=repair.lora_rank, lora_alpha=repair.lora_alpha)
    subject.hold(split.backbone)
    return split


def schedule(recipe: Recipe) -> list[tuple[int, str]]:
    """(round, stage) in the order they run."""
    kinds = [kind for kind in recipe.schedule.order if kind != "consistency" or recipe.consistency.enabled]
    return [(round_, kind) for round_ in range(1, recipe.schedule.rounds + 1) for kind in kinds]


@dataclass
class Training:
    """The stages of one repair; the rows are made once, on first use, from the original model's replies."""

    subject: Subject
    trained: Trained
    identified: Identified
    _rows: list[Row] | None = None

    @property
    def experts(self) -> ExpertSet:
        return self.identified.experts

    @property
    def may_move(self) -> ExpertSet | None:
        """The experts that training was allowed to change; None: everything."""
        return None if self.subject.recipe.repair.scope == "full" else self.experts

    @property
    def stages(self) -> dict[str, Callable[[Path, str], StageResult]]:
        return {"repair": self.repair, "consistency": self.consistency}

    def repair(self, folder: Path, inputs: str) -> StageResult:
        """Minimise L_SFT over the critical experts at the present router."""
        section = self.subject.recipe.repair
        options = RepairOptions(**{name: getattr(section, name) for name in RepairOptions.__dataclass_fields__})
        return repair_experts(
            self.trained,
            self.subject.tokenizer,
            self.rows(),
            options,
            section.trainer_args,
            folder,
            self._seed,
            inputs,
        )

    def consistency(self, folder: Path, inputs: str) -> StageResult:
        """Minimise L_router over the routers at the present experts."""
        section = self.subject.recipe.consistency
        options = ConsistencyOptions(
            **{name: getattr(section, name) for name in ConsistencyOptions.__dataclass_fields__}
        )
        rows = consistency_rows(self.identified.targets, self.rows(), section.benign_weight)
        return make_routing_consistent(
            self.trained, self.subject.tokenizer, rows, options, section.trainer_args, folder, self._seed, inputs
        )

    def rows(self) -> list[Row]:
        """Rows of the repair stage, from the original model's own replies."""
        if self._rows is None:
            with self.trained.original() as original:
                self._rows = self._answered_by(original.model)
        return self._rows

    def _answered_by(self, original: PreTrainedModel) -> list[Row]:
        section = self.subject.recipe.repair
        return repair_rows(
            self.identified.targets,
            self.identified.refusals,
            self.subject.corpus,
            Mix(**{name: getattr(section, name) for name in Mix.__dataclass_fields__}),
            self.subject.replies_of(original),
            self.subject.judge,
            self._seed,
        )

    def texts(self) -> list[tuple[str, str]]:
        """Up to 64 jailbroken and 64 harmless (prompt, reply) texts on which routing drift is measured."""
        rows = self.rows()
        jailbreaks = [(row.prompt, row.reply) for row in rows if row.source == "jailbreak"][:64]
        return jailbreaks + [(row.prompt, row.reply) for row in rows if row.stream == "retain"][:64]

    def elsewhere(self, subject: Subject, experts: ExpertSet) -> None:
        """The whole schedule again, same rows and seed, on other experts of a fresh copy of the model."""
        rows = self._rows or self._answered_by(subject.model)
        control = Training(subject, under_repair(subject, experts), self.identified, rows)
        for number, (_, kind) in enumerate(schedule(subject.recipe)):
            folder = subject.recipe.folder / "stages" / "control"
            control.stages[kind](folder / str(number), self.inputs("control"))

    def inputs(self, kind: str) -> str:
        """Hash of the recipe's parts that a stage depends on, besides the stages before it."""
        own = {"repair": ["repair"], "consistency": ["repair", "consistency"]}
        sections = own.get(kind, ["repair", "consistency", "schedule", "evaluate"])
        return self.subject.hash(*sections)

    @property
    def _seed(self) -> int:
        return self.subject.recipe.run.seed


def in_run_folder(run: Run, name: str, number: int, training: Training, kind: str, before: Stage) -> Stage:
    """Train a stage and keep its weights, or take them up where the stage was done before."""
    stage = run.stage(name, training.inputs(kind), after=[before])
    folder = run.stage_dir(number, name)
    state, log, sizes = folder / "state.safetensors", folder / "log.json", folder / "parameters.json"
    if stage.done:
        training.trained.load_state_dict(load_file(state))
        return stage
    set_seed(run.recipe.run.seed + number)
    result = training.stages[kind](folder, stage.identity)
    weights = training.trained.state_dict()
    if is_main_process():
        save_tensors(state, weights)
        atomic_write(log, json.dumps(result.log, indent=1))
        counts = {"trained_parameters": result.trained_parameters, "total_parameters": result.total_parameters}
        atomic_write(sizes, json.dumps(counts))
    stage.finish([state, log, sizes])
    checkpoint.clear(folder)
    return stage
