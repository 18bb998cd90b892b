"""What each training stage was given and what it did: tables of the report, and the cautions that follow."""

from __future__ import annotations

from typing import Any

from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import MethodSection

WORDS = {
    "routing_gap": "Routing gap, KL in nats",
    "flip_rate": "Expert choices that differ",
    "refusal_loss": "Loss of the refusal inside the jailbreak, nats a token",
}


def stage_sections(run: Artefacts) -> list[MethodSection]:
    """The effect of every stage, then its rows by source; what the run does not have is left out."""
    found = []
    effects = [[e["stage"], *(_change(e[name]) for name in WORDS), _acted(e)] for e in _effects(run)]
    if effects:
        columns = ["Stage", *WORDS.values(), "Effect"]
        about = ("Measured", "at the tokens of the refusal, jailbroken goals against the same goals asked plainly")
        found.append(MethodSection("stages", "What each stage did", [about], columns, effects))
    rows = [
        [stage, source, *(f"{counts[name]:,}" for name in ("kept", "cut", "unfinished")), _dropped(counts["dropped"])]
        for stage, sources in run.rows.items()
        for source, counts in sources.items()
    ]
    if rows:
        columns = ["Stage", "Source", "Kept", "... cut by max_length", "... reply unfinished", "Dropped"]
        about = ("Unfinished", "the reply met the limit of its generation; neither it nor a cut one trains an end")
        found.append(MethodSection("rows", "Rows of the training stages", [about], columns, rows))
    return found


def stage_cautions(run: Artefacts) -> list[str]:
    """Stages that did nothing, and kinds of rows of which a stage saw less than half."""
    found = [
        f"Stage {e['stage']} had no effect: {WORDS[e['works_on']].lower()} went from {e[e['works_on']]['before']:.4f} "
        f"to {e[e['works_on']]['after']:.4f}, a fall of less than a tenth."
        for e in _effects(run)
        if not e["acted"]
    ]
    for stage, sources in run.rows.items():
        for source, counts in sources.items():
            dropped = sum(counts["dropped"].values())
            if dropped > counts["kept"]:
                found.append(f"Stage {stage} dropped {dropped} of {dropped + counts['kept']} rows '{source}'.")
    return found


def _effects(run: Artefacts) -> list[dict[str, Any]]:
    return [effect for effect in run.diagnostics.get("stages") or [] if "works_on" in effect]


def _change(figure: dict[str, float]) -> str:
    return f"{figure['before']:.4f} \u2192 {figure['after']:.4f}"


def _acted(effect: dict[str, Any]) -> str:
    return "yes" if effect["acted"] else "NONE"


def _dropped(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "0"
