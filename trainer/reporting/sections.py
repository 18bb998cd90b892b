"""What each section of the report shows, as plain text and lists for the template."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer.reporting import curves
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.figures import Figure, Lengths
from trainer.reporting.method_report import Facts
from trainer.reporting.verdict import percent

_OUTCOMES = {
    "anchor_refused": "Plain goals that the model refused (usable)",
    "anchor_not_refused": "Plain goals dropped: the model did not refuse them",
    "kept": "Pairs kept: refused plainly, answered inside the jailbreak",
    "jailbreak_failed": "Pairs dropped: the jailbreak was refused too",
    "unjudged": "Pairs dropped: the reply could not be judged",
}
_TREND_WORDS = {
    "better": "better",
    "worse": "worse",
    "unclear": "may be chance",
    "unknown": "",
}


@dataclass(frozen=True)
class Cell:
    """An R in words: "12.5 %", "[5.1, 27.9]", and the exact rate for machines."""

    rate: str
    interval: str
    n: int
    unjudged: int
    exact: float


@dataclass(frozen=True)
class TableRow:
    """One line of the table of figures; a cell is None where the figure was not measured."""

    key: str
    label: str
    before: Cell | None
    after: Cell | None
    change: str
    interval: str
    trend: str
    trend_words: str
    controls: dict[str, Cell]


def table_row(figure: Figure) -> TableRow:
    """The line of one figure."""
    change = "" if figure.change is None else _signed(figure.change)
    interval, words = "", _TREND_WORDS[figure.trend]
    if figure.paired is not None:
        low, high = figure.paired["ci95"]
        interval = f"[{_signed(low)}, {_signed(high)}]"
        if figure.paired["gained"] == figure.paired["lost"] == 0:
            interval, words = "", "no answer turned"
    controls = {name: found for name, rate in figure.controls.items() if (found := _cell(rate)) is not None}
    return TableRow(
        figure.key,
        figure.label,
        _cell(figure.before),
        _cell(figure.after),
        change,
        interval,
        figure.trend,
        words,
        controls,
    )


def length_row(found: Lengths) -> TableRow:
    """The line of how long replies are; its change is in tokens."""
    change = f"{found.after['mean'] - found.before['mean']:+.1f}" if found.before and found.after else ""
    controls = {name: cell for name, of in found.controls.items() if (cell := _length_cell(of)) is not None}
    before, after = _length_cell(found.before), _length_cell(found.after)
    return TableRow(found.key, found.label, before, after, change, "", "unknown", "tokens" if change else "", controls)


def _length_cell(of: dict[str, Any] | None) -> Cell | None:
    if of is None:
        return None
    words = f"median {of['median']:g}, {of['cut']} cut by the limit"
    return Cell(f"{of['mean']:.1f}", words, of["n"], 0, of["mean"])


def _cell(rate: dict[str, Any] | None) -> Cell | None:
    if rate is None:
        return None
    low, high = rate["ci95"]
    unjudged = int(rate.get("unjudged") or 0)
    return Cell(percent(rate["rate"]), f"[{100 * low:.1f}, {100 * high:.1f}]", rate["n"], unjudged, rate["rate"])


def about(run: Artefacts) -> Facts:
    """Model, method, seed and date, as far as they are known."""
    model = run.recipe.get("model")
    named = {
        "Model": (model.get("name_or_path") if isinstance(model, dict) else None) or run.expert_set.get("model"),
        "Method": run.recipe.get("method"),
        "Seed": run.manifest.get("seed"),
        "Started": run.manifest.get("created"),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def what_changed(run: Artefacts) -> Facts:
    """How much of the model the repair moved, and the proof that nothing else did."""
    diagnostics = run.diagnostics
    facts: Facts = []
    members = run.expert_set.get("members") or []
    total = _experts_total(run)
    if members:
        words = "Critical experts" if trains_experts(run) else "Critical experts found, none of them trained"
        facts.append((words, _of(len(members), total)))
        stable = [m["stability"] for m in members if m.get("stability") is not None]
        if stable:
            often = sum(value >= 0.9 for value in stable)
            facts.append(("... selected in at least 90 % of bootstrap resamples", _of(often, len(stable))))
    if diagnostics.get("experts_changed") is not None:
        changed, of = diagnostics["experts_changed"], diagnostics.get("experts_total") or total
        facts.append(("Experts whose weights differ from the original", _of(changed, of)))
    if run.expert_set.get("shared_experts"):
        changed, of = diagnostics.get("shared_experts_changed", 0), len(run.expert_set["shared_experts"])
        facts.append(("Shared experts of the set whose weights differ from the original", _of(changed, of)))
    if diagnostics.get("gate_weights_changed") is not None:
        share = float(diagnostics["gate_weights_changed"])
        facts.append(("Gate weights that differ", percent(share) if share <= 1 else f"{share:,.0f}"))
    facts += _parameters(run)
    if "untouched_identical" in diagnostics:
        verdicts = {True: "yes, bit for bit", False: "NO", None: "not claimed (every weight may move)"}
        facts.append(("Everything else identical to the original", verdicts[diagnostics["untouched_identical"]]))
    if isinstance(diagnostics.get("router_restore_gap"), (int, float)):
        gap = f"{_signed(diagnostics['router_restore_gap'])} points"
        facts.append(("Change of attack success with the original router put back", gap))
    if isinstance(diagnostics.get("topk_flip_rate"), (int, float)):
        facts.append(("Expert choices that changed, mean over layers", percent(diagnostics["topk_flip_rate"])))
    return facts


def _parameters(run: Artefacts) -> Facts:
    stored = run.diagnostics.get("parameters")
    if isinstance(stored, dict) and {"trained", "total"} <= stored.keys():
        return [("Parameters trained", _of(stored["trained"], stored["total"]))]
    return [
        (f"Parameters trained in {stage}", _of(sizes["trained_parameters"], sizes["total_parameters"]))
        for stage, sizes in run.parameters.items()
        if {"trained_parameters", "total_parameters"} <= sizes.keys()
    ]


def _experts_total(run: Artefacts) -> int | None:
    per_layer = run.expert_set.get("experts_per_layer")
    if isinstance(per_layer, dict):
        return sum(per_layer.values())
    layers, experts = run.expert_set.get("num_layers"), run.expert_set.get("num_experts")
    return layers * experts if isinstance(layers, int) and isinstance(experts, int) else None


def _signed(share: float) -> str:
    points = f"{100 * share:+.1f}"
    return "0.0" if points in ("+0.0", "-0.0") else points.replace("-", "\u2212")


def _of(part: float, whole: float | None) -> str:
    return f"{part:,} of {whole:,} ({percent(part / whole)})" if whole else f"{part:,}"


def trains_experts(run: Artefacts) -> bool:
    """Whether the critical experts are what the run was to change, and not attention alone."""
    repair = run.recipe.get("repair")
    return not isinstance(repair, dict) or repair.get("scope") != "attention"


def experts_by_layer(run: Artefacts) -> list[tuple[int, str]]:
    """`(layer, "3, 17, 40")` for every layer that holds a critical expert; `shared` where its shared expert trains."""
    layers: dict[int, list[int]] = {}
    for member in run.expert_set.get("members") or []:
        layers.setdefault(int(member["layer"]), []).append(int(member["expert"]))
    shared = run.expert_set.get("shared_experts") or []
    return [
        (layer, ", ".join([*map(str, sorted(experts)), *(["shared"] if layer in shared else [])]))
        for layer, experts in sorted(layers.items())
    ]


def pairs(run: Artefacts) -> Facts:
    """Counts of `pairs.jsonl` by outcome, then the kept ones by wrapper id."""
    outcomes = Counter(str(row.get("outcome", "outcome not stated")) for row in run.pairs)
    known = [(wording, f"{outcomes.pop(key):,}") for key, wording in _OUTCOMES.items() if key in outcomes]
    kept = Counter(str(row["wrapper"]) for row in run.pairs if row.get("outcome") == "kept" and "wrapper" in row)
    by_wrapper = [(f"... kept with wrapper {name}", f"{count:,}") for name, count in kept.most_common()]
    return known + [(name, f"{count:,}") for name, count in outcomes.most_common()] + by_wrapper


def costs(run: Artefacts) -> list[tuple[str, str, str]]:
    """`(what, time, peak memory)` per stage of the manifest, then whatever `diagnostics.cost` adds."""
    rows: list[tuple[str, str, str]] = []
    stages = run.manifest.get("stages")
    total = 0.0
    for name, record in stages.items() if isinstance(stages, dict) else ():
        seconds = record.get("seconds")
        total += seconds or 0.0
        peaks = ((record.get("peak_gpu_memory_mb"), "GPU"), (record.get("peak_memory_mb"), "host"))
        memory = ", ".join(f"{size:,.0f} MB {where}" for size, where in peaks if size)
        rows.append((name, _duration(seconds) if seconds is not None else str(record.get("status", "")), memory))
    if rows:
        rows.append(("All stages", _duration(total), ""))
    cost = run.diagnostics.get("cost")
    for name, value in cost.items() if isinstance(cost, dict) else ():
        rows.append((name, f"{value:,.4g}" if isinstance(value, (int, float)) else str(value), ""))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def audit(run: Artefacts) -> Facts:
    """Every entry of `audit.json` in words; long lists are cut to their first five entries."""
    return [(name, _in_words(value)) for name, value in run.audit.items()]


def robustness(run: Artefacts) -> list[list[str]]:
    """Rows of what `routealign audit` measured: model, edited, experts, parameters, rates of `curves.FIGURES`."""
    return [
        [
            row["model"],
            " + ".join(row["kinds"]) or "nothing",
            f"{row['experts']:,} in {row['layers']} layers" if row["experts"] else "",
            percent(row["parameters"]),
            *(f"{cell.rate} {cell.interval}" for key in curves.FIGURES if (cell := _cell(row[key])) is not None),
        ]
        for row in run.robustness
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not applicable"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(part)}" for name, part in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        more = f", and {len(value) - 5} more" if len(value) > 5 else ""
        return ", ".join(map(str, value[:5])) + more if value else "none"
    return str(value)
