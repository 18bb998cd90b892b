"""What LoMC adds to the report and the card: the correction, what it cost, and what other edits would have done."""

from __future__ import annotations

from typing import Any

from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import Facts, MethodReport, MethodSection

FIGURES = ("over_refusal", "harmful_refusal", "asr_seen", "asr_unseen", "benign_compliance")


def report(run: Artefacts) -> MethodReport:
    found = run.diagnostics.get("correction") or {}
    if not found:
        return MethodReport("correction")
    rounds = [found, *found["later"]]
    sections = [
        MethodSection("correction", "The correction", _facts(found)),
        MethodSection(
            "safety",
            "What it cost in safety",
            columns=["figure", "change for the worse", "worst end of the 95 % interval", "within the bound"],
            rows=[
                [one["figure"], f"{one['change']:+.3f}", f"{one['worst']:+.3f}", "yes" if one["within"] else "NO"]
                for one in found["safety"]
            ],
        ),
        MethodSection(
            "strengths",
            "Corrections tried on held-out training prompts",
            columns=[
                "round",
                "prototypes",
                "strength",
                "wrong refusals",
                "harmful refusals",
                "answers",
                "KL",
                "within the bounds",
            ],
            rows=[
                [
                    str(number),
                    str(one["prototypes"]),
                    f"{one['strength']:g}",
                    f"{one['over_refusal']:.3f}",
                    f"{one['harmful_refusal']:.3f}",
                    f"{one['answered']:.3f}",
                    f"{one['kl']:.4f}",
                    "yes" if one["within"] else "no",
                ]
                for number, of_round in enumerate(rounds, 1)
                for one in of_round["tried"]
            ],
        ),
    ]
    if found["ablation"]:
        sections.append(_ablation(found, run.evaluation.get("after") or {}))
    units = f"{found['footprint']['units']} units ({', '.join(found['kinds'])})"
    factors = ", then along another by ".join(f"{1 - one['strength']:g}" for one in rounds)
    edited = f"What {units} write along one direction per layer was scaled by {factors}; nothing was trained"
    beyond = [one["figure"] for one in found["safety"] if not one["within"]]
    refused = f"No checkpoint was written: that it costs no safety could not be shown of {', '.join(beyond)}."
    return MethodReport("correction", sections, edited, [] if found["written"] else [refused])


def _facts(found: dict[str, Any]) -> Facts:
    reach = found["footprint"]
    written = "yes" if found["written"] else "NO: safety fell beyond the bound, or that it did not could not be shown"
    clusters = "a self-organising map" if found["clustering"] == "som" else f"{found['prototypes']} clusters"
    return [
        ("Checkpoint written", written),
        ("Kinds of units corrected", ", ".join(found["kinds"])),
        ("Strength", ", then ".join(f"{one['strength']:g}" for one in (found, *found["later"]))),
        (
            "Directions",
            f"{clusters}, orthogonal to harmful refusal, of {found['fitted']['wrong']} wrongly refused prompts"
            + "".join(f"; then of {one['left']} that were still refused" for one in found["later"]),
        ),
        ("Experts", f"{reach['experts']:,} in {reach['layers']} layers"),
        (
            "Parameters touched",
            f"{reach['parameters']:,} of {reach['of_parameters']:,} "
            f"({reach['parameters'] / reach['of_parameters']:.2%})",
        ),
        ("Relative change of these (Frobenius)", f"{reach['relative_change']:.4f}"),
        ("KL to the original on harmless replies", f"{found['kl']:.4f} nats per token"),
    ]


def _ablation(found: dict[str, Any], after: dict[str, Any]) -> MethodSection:
    chosen = {
        "strength": found["strength"],
        "metrics": after,
        "kl": found["kl"],
        "footprint": found["footprint"],
        "within_bounds": True,
    }
    rows = [
        [
            name.replace("_", " "),
            f"{one['strength']:g}",
            *(f"{one['metrics'][figure]['rate']:.3f}" if figure in one["metrics"] else "" for figure in FIGURES),
            " ".join(f"{rate['rate']:.3f}" for rate in (one["metrics"].get("capability") or {}).values()),
            f"{one['kl']:.4f}",
            f"{one['footprint']['parameters'] / one['footprint']['of_parameters']:.2%}",
            "yes" if one["within_bounds"] else "no",
        ]
        for name, one in {"this run": chosen, **found["ablation"]}.items()
    ]
    columns = [
        "edit",
        "strength",
        *(figure.replace("_", " ") for figure in FIGURES),
        "capability",
        "KL",
        "touched",
        "bounds",
    ]
    return MethodSection("ablation", "Other edits, each at its best strength", columns=columns, rows=rows)
