"""What AlignX adds to the report and the card: the axes, what they are compared with, the router, forgetting, cost."""

from __future__ import annotations

from typing import Any

from trainer.methods.alignx.evaluate import mean_rate
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import Facts, MethodReport, MethodSection


def report(run: Artefacts) -> MethodReport:
    found = run.evaluation.get("alignx") or {}
    if not found:
        return MethodReport("axes")
    sections = [_axes(found), _router(found["router"]), _forgetting(found["forgetting"])]
    if found["cost"]:
        sections.append(_cost(found["cost"]))
    axes = ", ".join(found["axes"])
    edited = f"Nothing: an adapter was trained for each of {axes}, and a head that mixes them"
    return MethodReport("axes", sections, edited, _cautions(found))


def _axes(found: dict[str, Any]) -> MethodSection:
    axes = list(found["axes"])
    rows = [
        [name.replace("_", " "), *(_shown(rates[axis]) for axis in axes), f"{mean_rate(rates):.3f}"]
        for name, rates in {**found["baselines"], "this mixture": found["axes"]}.items()
    ]
    return MethodSection(
        "axes", "Right behaviour on held-out prompts, by axis", columns=["model", *axes, "mean"], rows=rows
    )


def _router(router: dict[str, Any]) -> MethodSection:
    facts: Facts = [
        (f"Accuracy on {router['n']} test prompts", f"{router['accuracy']:.3f}"),
        ("Calibration error (ECE), before and after", f"{router['ece_before']:.4f}, {router['ece_after']:.4f}"),
        ("Brier score", f"{router['brier']:.4f}"),
    ]
    bank = router.get("bank") or {}
    facts += [(f"Left out of the head: {piece}", why) for piece, why in (bank.get("dropped") or {}).items()]
    figures = ["accuracy", "ece_before", "ece_after", "brier"]
    rows = [
        [name.replace("_", " "), *(f"{row[figure]:.4f}" for figure in figures)]
        for name, row in (bank.get("ablation") or {}).items()
    ]
    columns = ["head, on held-out rows of the bank", *(figure.replace("_", " ") for figure in figures)]
    return MethodSection("router", "The router", facts, columns if rows else [], rows)


def _forgetting(found: dict[str, Any]) -> MethodSection:
    axes = list(found["after"]["base"])
    rows = [[name, *(f"{rates[axis]['rate']:.3f}" for axis in axes)] for name, rates in found["after"].items()]
    return MethodSection("forgetting", "Every axis after every pass", columns=["after", *axes], rows=rows)


def _cautions(found: dict[str, Any]) -> list[str]:
    mine = mean_rate(found["axes"])
    better = [name for name, rates in found["baselines"].items() if mean_rate(rates) >= mine]
    better = [name for name in better if not name.startswith(("mixture_", "head_"))]
    if not better:
        return []
    named = ", ".join(f"{name} ({mean_rate(found['baselines'][name]):.3f})" for name in better)
    return [f"The mixture's average over the axes, {mine:.3f}, is not above that of {named}."]


def _shown(rate: dict[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}]"


def _cost(found: dict[str, Any]) -> MethodSection:
    rows = [
        [
            name.replace("_", " "),
            f"{one['latency']:.2f}",
            f"{one['parameters']:.2f}",
            "" if one["peak"] is None else f"{one['peak']:.2f}",
        ]
        for name, one in found.items()
    ]
    columns = ["way to answer", "time, of the base's", "parameters, of the base's", "peak memory, of the base's"]
    return MethodSection("cost-of-mixing", "Cost of an answer", columns=columns, rows=rows)
