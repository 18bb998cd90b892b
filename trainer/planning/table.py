"""A plan as a person reads it: parameters, memory per GPU by part and engine, a recommendation, steps."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.engines.memory import Memory
from trainer.planning.plan import GB, Plan
from trainer.runtime.console import say, table

CARDS = (24.0, 48.0, 80.0, 141.0)
"""Memory of common GPUs in GB, to answer for where there is none and none was named."""


def show(plan: Plan) -> None:
    """Print a plan."""
    parts = plan.parts
    shown = {
        "embeddings": parts.embeddings,
        "attention": parts.attention,
        f"routed experts ({parts.routed_experts})": parts.experts,
        "shared experts": parts.shared_experts,
        "routers": parts.routers,
        "dense MLPs": parts.dense_mlps,
        "norms and other": parts.other,
        "all": parts.total,
        "passed by one token": parts.active,
        f"critical experts ({parts.critical_experts})": parts.critical,
        "may change (footprint)": parts.footprint,
        **{f"trained by {stage}": number for stage, number in parts.trainable.items()},
    }
    rows = [[name, f"{number / 1e6:,.1f} M", f"{number / parts.total:.1%}"] for name, number in shown.items()]
    table(f"{plan.recipe.model.name_or_path}: parameters", ["part", "parameters", "of all"], rows)

    sizes = [plan.gpu_memory_gb] if plan.gpu_memory_gb is not None else list(CARDS)
    parts_shown = [name for name in Memory("", 0).parts() if any(_of(plan, name))]
    by_part, fitting = [], []
    for engine in plan.engines:
        now, saving = plan.per_gpu(engine), plan.per_gpu(engine, True)
        by_part.append([engine, now.stage, *(_gb(now.parts()[name]) for name in parts_shown), _gb(now.total)])
        totals = [_gb(total) for total in (now.total, saving.total, plan.host_memory(engine))]
        fitting.append([engine, *totals, *(_answer(plan, engine, size) for size in sizes)])
    where = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} a node, {plan.nodes} node{'s' if plan.nodes > 1 else ''}"
    table(
        f"memory of one GPU in GB at the fullest stage ({where})",
        ["engine", "fullest stage", *parts_shown, "total"],
        by_part,
    )
    columns = ["engine", "total", "with checkpointing", "host", *(f"{size:g} GB" for size in sizes)]
    table("which engine fits; host: memory of a node, in GB", columns, fitting)

    for size in sizes:
        _recommend(plan, size)
    for found in plan.steps():
        tokens = f"{found.tokens / 1e6:.1f} M tokens"
        say(f"{found.stage}: at most {found.rows} rows, {found.steps} optimiser steps, {tokens}")
    for note in plan.notes:
        say(f"note: {note}")


def _recommend(plan: Plan, size: float) -> None:
    chosen = plan.recommend(size)
    if chosen is None:
        say(f"{size:g} GB: no engine fits; what saves memory:")
        for line in plan.advice(size):
            say(f"  {line}")
        return
    where = " and ".join(plan.training)
    more = f" gradient_checkpointing=true in {where}" if chosen.checkpointing > plan.checkpointing else ""
    say(f"{size:g} GB: --engine {chosen.engine}{' with' if more else ''}{more}")


def _of(plan: Plan, name: str) -> Iterable[int]:
    return (plan.per_gpu(engine).parts()[name] for engine in plan.engines)


def _answer(plan: Plan, engine: str, size: float) -> str:
    if plan.fits(engine, gpu_memory_gb=size):
        return "yes"
    return "checkpointing" if plan.fits(engine, True, size) else "no"


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"
