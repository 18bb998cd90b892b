"""How each benchmark lays out its rows: a module a source, from its own file or from its data set on the Hub."""

from collections.abc import Callable

from ..tables import Table
from ..usable import Rows
from . import (
    advbench,
    alpaca,
    beavertails,
    gsm8k,
    harmbench,
    harmfulqa,
    hh_rlhf,
    jailbreakbench,
    mmlu,
    mt_bench,
    or_bench,
    records,
    safety_tuned_llamas,
    strongreject,
    truthfulqa,
    xstest,
)

FORMATS: dict[str, Callable[[Table], Rows]] = {
    "records": records.read,
    "qa": records.read_answered,
    "advbench": advbench.read,
    "harmbench": harmbench.read,
    "jailbreakbench": jailbreakbench.read,
    "strongreject": strongreject.read,
    "harmfulqa": harmfulqa.read,
    "beavertails": beavertails.read,
    "hh-rlhf": hh_rlhf.read,
    "xstest": xstest.read,
    "or-bench": or_bench.read,
    "alpaca": alpaca.read,
    "safety-tuned-llamas": safety_tuned_llamas.read,
    "mt-bench": mt_bench.read,
    "gsm8k": gsm8k.read,
    "mmlu": mmlu.read,
    "truthfulqa": truthfulqa.read,
    "truthfulqa-mc": truthfulqa.read_choices,
}
"""Name of a format -> its rows, read anew with every call. Every one raises `UserError` with row and column."""

HARMFUL_ONLY = frozenset({"advbench", "harmbench", "strongreject", "harmfulqa", "beavertails"})
"""Formats that hold nothing but requests to be refused."""
