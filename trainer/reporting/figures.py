"""The figures of `evaluation.json` as one flat, ordered list, and what each change means."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ALPHA = 0.05
Direction = Literal["lower", "higher"]
Trend = Literal["better", "worse", "unclear", "unknown"]

# Order and wording in chart and table. Keys that are not listed follow, under their own name, without a direction.
_KNOWN: dict[str, tuple[str, Direction | None]] = {
    "asr_seen": ("Attack success, seen families", "lower"),
    "asr_unseen": ("Attack success, unseen families", "lower"),
    "asr_robust": ("Attack success, robust families", "lower"),
    "harmful_refusal": ("Plain harmful requests refused", "higher"),
    "over_refusal": ("Borderline harmless requests refused", "lower"),
    "benign_compliance": ("Harmless requests answered, plain", "higher"),
    "benign_wrapped_compliance": ("Harmless requests answered, wrapped", "higher"),
    "degenerate": ("Degenerate replies", "lower"),
    "finished": ("Replies that the model ended itself", None),
    "finished_benign": ("... to harmless requests", None),
}
_GROUPS: dict[str, tuple[str, Direction]] = {
    "benign_wrapped_by_role": ("Harmless, wrapped in {} families", "higher"),
    "capability": ("Capability: {}", "higher"),
    "asr": ("Attack success: {}", "lower"),
}


@dataclass(frozen=True)
class Figure:
    """One figure: its key path in M, its wording, which way is good, and R before, after and of each control.

    `paired`: the change answer by answer, where the run has it (`changes` of `evaluation.json`).
    """

    key: str
    label: str
    direction: Direction | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    controls: dict[str, dict[str, Any]]
    paired: dict[str, Any] | None = None

    @property
    def change(self) -> float | None:
        """After minus before, as a share; None where one of them was not measured."""
        return self.after["rate"] - self.before["rate"] if self.before and self.after else None

    @property
    def is_part(self) -> bool:
        """Whether this is one family or role of a figure that stands in the list as a whole."""
        return self.key.startswith(("asr.", "benign_wrapped_by_role."))

    @property
    def trend(self) -> Trend:
        """ "better" or "worse" where the difference is more than chance, "unclear" where it may be chance.

        Paired answers: the clustered interval leaves 0 out, and the sign test's p is below .05. Without them
        (capability, runs of former releases): the two 95 % intervals are disjoint, which asks for more.
        """
        if not self.before or not self.after or self.direction is None:
            return "unknown"
        if self.paired is not None:
            low, high = self.paired["ci95"]
            if low <= 0 <= high or self.paired["p"] >= ALPHA:
                return "unclear"
            return "better" if (low > 0) == (self.direction == "higher") else "worse"
        return compare(self.after, self.before, self.direction)


def compare(ours: Mapping[str, Any], other: Mapping[str, Any], direction: Direction) -> Trend:
    """How R `ours` stands to R `other`: "better" or "worse" by disjoint intervals, else "unclear"."""
    (low, high), (other_low, other_high) = ours["ci95"], other["ci95"]
    if low > other_high:
        return "better" if direction == "higher" else "worse"
    if high < other_low:
        return "better" if direction == "lower" else "worse"
    return "unclear"


def is_rate(value: object) -> bool:
    """Whether a value is an R (docs/evaluation-json.md)."""
    return isinstance(value, dict) and {"rate", "n", "ci95"} <= value.keys()


def collect(evaluation: Mapping[str, Any]) -> list[Figure]:
    """Every figure found in `before`, `after` or a control of `evaluation.json`, known ones first."""
    before, after = dict(_rates(evaluation["before"])), dict(_rates(evaluation["after"]))
    controls = {name: dict(_rates(found)) for name, found in control_metrics(evaluation).items()}
    keys = list(dict.fromkeys([*before, *after, *(key for rates in controls.values() for key in rates)]))
    return [
        Figure(
            key=key,
            label=_wording(key)[0],
            direction=_wording(key)[1],
            before=before.get(key),
            after=after.get(key),
            controls={name: rates[key] for name, rates in controls.items() if key in rates},
            paired=(evaluation.get("changes") or {}).get(key),
        )
        for key in sorted(keys, key=_rank)
    ]


@dataclass(frozen=True)
class Lengths:
    """Tokens of replies (`reply_tokens` of M) before, after and of each control that was measured so."""

    key: str
    label: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    controls: dict[str, dict[str, Any]]


def lengths(evaluation: Mapping[str, Any]) -> list[Lengths]:
    """How long replies are: all of them, then those to harmless requests; empty for runs of former releases."""
    named = {"all": "Tokens of a reply", "benign": "... to a harmless request"}
    before, after = (evaluation[side].get("reply_tokens") or {} for side in ("before", "after"))
    controls = {name: found.get("reply_tokens") or {} for name, found in control_metrics(evaluation).items()}
    return [
        Lengths(
            f"reply_tokens.{part}",
            label,
            before.get(part),
            after.get(part),
            {name: found[part] for name, found in controls.items() if part in found},
        )
        for part, label in named.items()
        if part in before or part in after
    ]


def mostly_cut(measured: Mapping[str, Any]) -> tuple[int, int] | None:
    """(cut, all) replies of an M where the length limit cut more than half of them, else None."""
    found = (measured.get("reply_tokens") or {}).get("all")
    return (found["cut"], found["n"]) if found and 2 * found["cut"] > found["n"] else None


def control_metrics(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Models measured beside ours, by display name: random experts and the like, where the run has them."""
    diagnostics = evaluation.get("diagnostics") or {}
    named = {
        "Random experts": "random_control",
        "Attention alone": "attention_control",
        "Bottom of the ranking": "bottom_control",
        "Steering": "steering_baseline",
    }
    found = {name: diagnostics.get(key) for name, key in named.items()}
    return {name: metrics for name, metrics in found.items() if isinstance(metrics, dict) and metrics}


def _rates(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in metrics.items():
        if is_rate(value):
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _rates(value, f"{prefix}{key}.")


def _wording(key: str) -> tuple[str, Direction | None]:
    if key in _KNOWN:
        return _KNOWN[key]
    group, _, member = key.partition(".")
    if member and group in _GROUPS:
        pattern, direction = _GROUPS[group]
        return pattern.format(member), direction
    return key, None


def _rank(key: str) -> tuple[int, int]:
    group = key.partition(".")[0]
    if key in _KNOWN:
        return (0, list(_KNOWN).index(key))
    return (1, list(_GROUPS).index(group)) if group in _GROUPS else (2, 0)
