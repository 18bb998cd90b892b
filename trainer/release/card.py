"""The model card of a repaired model, from the artefacts of its run folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trainer.reporting import sections
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.figures import Figure, collect
from trainer.reporting.templates import template
from trainer.reporting.verdict import cautions, headline
from trainer.runtime.redaction import is_local, without_path, without_paths

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_SOURCES = {
    "asr": "harmful",
    "harmful_refusal": "harmful",
    "over_refusal": "borderline",
    "benign_compliance": "benign",
    "benign_wrapped_compliance": "benign",
}
"""Which prompts a figure is measured on: the key under `data` in the recipe."""


@dataclass(frozen=True)
class Licence:
    """Of the base model, as its own card names it; all None where that is not known."""

    identifier: str | None = None
    name: str | None = None
    link: str | None = None


def model_card(
    run: Artefacts, repo: str, licence: Licence, *, has_model: bool, has_patch: bool, edited: str | None = None
) -> str:
    """The `README.md` of a repository on the Hub: metadata with a `model-index`, then the card.

    Only names of files and counts of prompts are shown, never a prompt or a reply.

    Args:
        edited: the method's sentence on what was changed ("Only the routers were trained."), which ends in the audit's
            word on all the rest; by default the audit's count.
    """
    figures = collect(run.evaluation)
    base = str((run.recipe.get("model") or {}).get("name_or_path") or run.expert_set.get("model") or "unknown")
    verdict, sentences = headline(figures)
    rows = [sections.table_row(figure) for figure in figures]
    return template(_TEMPLATE, escape=False, cell=_cell, rate=_rate).render(
        metadata=_metadata(run, figures, base, repo, licence, has_model).to_yaml(),
        title=repo.partition("/")[2],
        repo=repo,
        verdict=verdict,
        sentences=sentences,
        base=_linked(base),
        base_argument=base if not is_local(base) else "BASE",
        trained=_trained(run.audit, edited),
        facts=[(name, without_path(value)) for name, value in sections.about(run)] + sections.what_changed(run),
        experts=sections.experts_by_layer(run) if sections.trains_experts(run) else [],
        rows=rows,
        cautions=cautions(run, figures),
        audit=sections.audit(run),
        data=list(_data(run.recipe.get("data") or {})),
        has_model=has_model,
        has_patch=has_patch,
        licence=_licence(licence, base),
    )


def _trained(audit: dict[str, Any], edited: str | None) -> str:
    """What was changed, and that nothing else was, which is the audit's to say."""
    if not audit.get("untouched_identical"):
        return "All of its weights were trained."
    if edited is None:
        footprint = audit.get("footprint")  # audits of earlier releases have none
        edited = "Only a part of its weights was open to change"
        if footprint:
            edited = f"Only {footprint['parameters']:,} of its {footprint['of']:,} parameters were open to change"
    return f"{edited.removesuffix('.')}; every other weight is the base's, bit for bit."


def _metadata(
    run: Artefacts, figures: list[Figure], base: str, repo: str, licence: Licence, has_model: bool
) -> ModelCardData:
    known = licence.identifier is not None
    data = run.recipe.get("data") or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=source,
            metric_type=figure.key,
            metric_name=figure.label,
            metric_value=round(figure.after["rate"], 4),
            metric_args={"n": figure.after["n"], "ci95": [round(end, 4) for end in figure.after["ci95"]]},
        )
        for figure in figures
        if figure.after is not None and not figure.is_part
        for source in [_source(figure.key, data)]
    ]
    return ModelCardData(
        base_model=None if is_local(base) else base,
        base_model_relation=None if is_local(base) else "finetune",
        library_name="transformers" if has_model else "routealign",
        pipeline_tag="text-generation" if has_model else None,
        license=licence.identifier if known else "other",
        license_name=licence.name if known else "see-base-model",
        license_link=licence.link if known or is_local(base) else f"https://huggingface.co/{base}",
        tags=["routealign", "mixture-of-experts", "safety", str(run.recipe.get("method", "repair"))],
        model_name=repo.partition("/")[2],
        eval_results=results,
    )


def _source(key: str, data: dict[str, Any]) -> str:
    """Name of the data set that a figure is measured on, or of the figure itself where several are mixed."""
    group, _, member = key.partition(".")
    if group == "capability":
        tasks = data.get("capability") or []
        return next((without_path(task["path"]) for task in tasks if task["name"] == member), member)
    name = _SOURCES.get("asr" if group.startswith("asr") else group)
    found = data.get(name) if name else None
    return without_path(str(found.get("test_path") or found["path"])) if found else group


def _data(data: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(what, source, rows to train on, rows to evaluate on)."""
    data = without_paths(data)
    for name in ("harmful", "benign", "borderline"):
        if source := data.get(name):
            tested = f"{source['test']}" + (f" of {source['test_path']}" if source.get("test_path") else "")
            yield name, source["path"], str(source["train"]), tested
    if jailbreaks := data.get("jailbreaks"):
        held_out = ", ".join([*jailbreaks.get("unseen", []), *jailbreaks.get("robust", [])])
        families = [f"families {', '.join(jailbreaks['families'])}"] if jailbreaks.get("families") else []
        dealt = "dealt by family" if families and not (jailbreaks.get("seen") or held_out) else ""
        source = ", ".join([*filter(None, [jailbreaks.get("path")]), *families])
        yield "jailbreak templates", source, ", ".join(jailbreaks.get("seen", [])) or dealt, held_out or dealt
    for task in data.get("capability") or []:
        yield f"capability: {task['name']}", task["path"], "none", str(task["test"])


def _licence(licence: Licence, base: str) -> str:
    if licence.identifier is None:
        return f"That of the base model; see {_linked(base)}."
    named = licence.name if licence.identifier == "other" and licence.name else licence.identifier
    return f"That of the base model: {named}" + (f" ({licence.link})." if licence.link else ".")


def _linked(base: str) -> str:
    return f"`{without_path(base)}`" if is_local(base) else f"[{base}](https://huggingface.co/{base})"


def _cell(value: object) -> str:
    """One cell of a Markdown table: what has a meaning in Markdown or HTML is taken literally."""
    return re.sub(r"([\\`*_\[\]|<>&])", r"\\\1", " ".join(str(value).split()))


def _rate(cell: sections.Cell | None) -> str:
    return "" if cell is None else f"{cell.rate} {cell.interval}"
