"""What the report says of a steering: the sets, what they did to the routing, the gate, the controls and the sweep."""

from typing import Any

from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import Facts, MethodReport, MethodSection
from trainer.reporting.verdict import percent

SWEEP = ("asr_seen", "asr_unseen", "over_refusal", "benign_compliance", "degenerate")


def report(run: Artefacts) -> MethodReport:
    """The section on the steering, where the run has come so far."""
    steering = run.diagnostics.get("steering")
    if not isinstance(steering, dict):
        return MethodReport("steering")
    columns, rows = sweep(run)
    section = MethodSection("steering", "Steering", facts(run, steering), columns, rows)
    return MethodReport("steering", [section], "Nothing: steering changes no weight.")


def facts(run: Artefacts, steering: dict[str, Any]) -> Facts:
    """(name, value) in the order shown."""
    changed = steering.get("tokens_changed") or []
    found: Facts = []
    for name, active in (("Experts activated", True), ("Experts deactivated", False)):
        named = [
            f"{e['layer']}.{e['expert']} ({percent(e['share'])} of tokens decided otherwise)"
            for e in changed
            if e["active"] is active
        ]
        found.append((f"{name} (layer.expert)", ", ".join(named) or "none"))
    found.append(("Strength", f"{steering['strength']:g}"))
    if "forced" in steering:
        found.append(("Forced on every token of the probe prompts", "yes" if steering["forced"] else "no"))
    gate = steering.get("gate")
    if gate:
        accuracy = percent(gate["held_out_balanced_accuracy"])
        found.append(("Gate on the input, balanced accuracy on held-out training prompts", accuracy))
        ungated = steering["ungated"]
        found += [
            (f"Ungated: {key}", percent(ungated[key]["rate"]))
            for key in ("asr_seen", "asr_unseen", "over_refusal", "benign_compliance", "benign_wrapped_compliance")
            if key in ungated
        ]
    if fluency := steering["perplexity"]:
        values = f"{fluency['before']:.2f}, steered {fluency['after']:.2f}"
        found.append(("Perplexity of replies under the original model", values))
    found += [
        (
            f"Attack success, {name}",
            f"seen {percent(m['asr_seen']['rate'])}, unseen {percent(m['asr_unseen']['rate'])}",
        )
        for name, m in _controls(run.diagnostics)
    ]
    return found


def sweep(run: Artefacts) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the settings tried; no rows where nothing was swept."""
    rows = (run.diagnostics.get("steering") or {}).get("sweep") or []
    columns = ["A+", "A\u2212", "Strength", "Gate", *SWEEP, "perplexity"]
    return columns, [
        [
            str(row["n_pos"]),
            str(row["n_neg"]),
            f"{row['strength']:g}",
            "yes" if row["gated"] else "no",
            *(percent(row["metrics"][name]["rate"]) if name in row["metrics"] else "" for name in SWEEP),
            f"{row['perplexity']:.2f}" if row["perplexity"] is not None else "",
        ]
        for row in rows
        if "metrics" in row
    ]


def _controls(diagnostics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    draws = [(f"random experts, draw {i + 1}", m) for i, m in enumerate(diagnostics.get("random_draws") or [])]
    bottom = diagnostics.get("bottom_control")
    return [*draws, *([("bottom of the ranking", bottom)] if bottom else [])]
