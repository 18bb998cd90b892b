"""`write(run_dir)`: one self-contained `report.html`, made from the artefacts of a run folder and nothing else, and
its figures as numbers, `figures.csv`.

What is read, all but the first optional; keys that a file lacks are left out of the report or named as missing:

- `evaluation.json`: `{"before": M, "after": M, "diagnostics": D}` as in docs/evaluation-json.md. Of D:
  `router_restore_gap`, `topk_flip_rate`, `gate_weights_changed` (share), `experts_changed`, `experts_total`,
  `untouched_identical`, `random_control`, `attention_control` (M or a part of it),
  `drift_per_layer` [{layer, flip_rate, kl}], `parameters` {trained, total}, `cost` {name: number or text},
  `stages` as in docs/evaluation-json.md.
- `recipe.yaml`, shown as it is; `manifest.json`: name, created, seed, versions {name: version},
  stages {name: {status, seconds, peak_memory_mb, peak_gpu_memory_mb}}.
- `pairs.jsonl`: one row per goal or pair with `outcome` (and `wrapper`); only counts are shown, never a text.
- `activations.parquet`: columns layer, expert, score, ...; `expert_set.json`: `num_layers`, `experts_per_layer` or
  `num_experts`, `members` [{layer, expert, score, stability}].
- `stages/<n>-<name>/log.json`: the trainer's log_history; `parameters.json`: {trained_parameters, total_parameters};
  `rows.json`: source -> {kept, cut, unfinished, dropped {reason: rows}}.
- `robustness.json`: what `routealign audit` measured, [{model, kinds, experts, layers, parameters, harmful_refusal,
  benign_compliance}]; the section is left out without it.
- `audit.json`: name to value; `moved_outside` lists tensor names, `footprint` is an object, `reload_ok` a truth value.
"""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from trainer.reporting import curves, figures_csv, plots, sections
from trainer.reporting.artefacts import Artefacts, read
from trainer.reporting.figures import Figure, collect, control_metrics, lengths
from trainer.reporting.method_report import MethodReport, Report
from trainer.reporting.stages import stage_sections
from trainer.reporting.templates import template
from trainer.reporting.verdict import cautions, headline
from trainer.runtime.files import atomic_write

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(run_dir: Path, report: Report | None = None) -> Path:
    """Write `report.html` and `figures.csv` into the run folder and return the report's path.

    Args:
        report: what the run's method adds; None where the method is not known.

    Raises `UserError` where `evaluation.json` is absent or an artefact that is present cannot be read.
    """
    run = read(Path(run_dir))
    path = run.folder / "report.html"
    figures = collect(run.evaluation)
    atomic_write(path, _render(run, figures, report(run) if report else MethodReport()))
    atomic_write(run.folder / "figures.csv", figures_csv.text(figures))
    return path


def _render(run: Artefacts, figures: list[Figure], method: MethodReport) -> str:
    verdict, sentences = headline(figures)
    return template(_TEMPLATE, escape=True).render(
        title=run.manifest.get("name") or run.folder.resolve().name,
        kind=method.kind,
        about=sections.about(run),
        verdict=verdict,
        sentences=sentences,
        cautions=[*method.cautions, *cautions(run, figures)],
        controls=list(control_metrics(run.evaluation)),
        rows=[sections.table_row(figure) for figure in figures]
        + [sections.length_row(found) for found in lengths(run.evaluation)],
        changed=sections.what_changed(run),
        method=[*stage_sections(run), *method.sections],
        experts=sections.experts_by_layer(run),
        pairs=sections.pairs(run),
        costs=sections.costs(run),
        audit=sections.audit(run),
        robustness=sections.robustness(run),
        robustness_figures=list(curves.FIGURES.values()),
        recipe=run.recipe_text,
        versions=run.manifest.get("versions") or {},
        missing=sorted(run.missing),
        charts={name: Markup(svg) if svg else None for name, svg in _charts(run, figures).items()},
    )


def _charts(run: Artefacts, figures: list[Figure]) -> dict[str, str | None]:
    shown = [figure for figure in figures if not figure.is_part]
    drift: list[dict[str, Any]] = run.diagnostics.get("drift_per_layer") or []
    scores = run.activations
    has_scores = scores is not None and {"layer", "expert", "score"} <= set(scores.columns) and len(scores) > 0
    critical = {(member["layer"], member["expert"]) for member in run.expert_set.get("members") or []}
    return {
        "before_after": plots.before_after(shown) if any(figure.direction for figure in shown) else None,
        "families": plots.families(figures),
        "heat_map": plots.heat_map(scores, critical) if scores is not None and has_scores else None,
        "drift": plots.drift(drift) if drift else None,
        "losses": plots.losses(run.logs),
        "robustness": curves.robustness(run.robustness) if run.robustness else None,
    }
