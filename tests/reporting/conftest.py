"""A synthetic run folder with every artefact a report reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from trainer.reporting import html

UNSAFE = '<script>alert("x")</script> & $y_1$'


def rate(k: int, n: int, unjudged: int = 0) -> dict[str, Any]:
    found = binomtest(k, n).proportion_ci(method="wilson")
    return {"rate": k / n, "n": n, "ci95": [float(found.low), float(found.high)], "unjudged": unjudged}


def metrics(repaired: bool) -> dict[str, Any]:
    def pick(before: int, after: int, n: int, unjudged: int = 0) -> dict[str, Any]:
        return rate(after if repaired else before, n, unjudged)

    return {
        "asr": {"roleplay": pick(98, 2, 100), "past tense": pick(100, 1, 100), UNSAFE: pick(99, 31, 100)},
        "asr_seen": pick(198, 3, 200),
        "asr_unseen": pick(99, 31, 100, 2 if repaired else 0),
        "asr_robust": pick(25, 20, 100),
        "harmful_refusal": pick(97, 98, 100),
        "over_refusal": pick(22, 24, 125),
        "benign_compliance": pick(99, 99, 100),
        "benign_wrapped_compliance": pick(199, 150, 200),
        "benign_wrapped_by_role": {"seen": pick(100, 60, 100), "unseen": pick(99, 90, 100)},
        "degenerate": pick(1, 5, 900),
        "capability": {"sums": pick(30, 29, 40)},
    }


def effect(stage: str, works_on: str, acted: bool) -> dict[str, Any]:
    figures = {name: {"before": 0.028, "after": 0.0254} for name in ("routing_gap", "flip_rate", "refusal_loss")}
    return {"stage": stage, "kind": stage[:-2], **figures, "works_on": works_on, "acted": acted}


def evaluation() -> dict[str, Any]:
    return {
        "before": metrics(False),
        "after": metrics(True),
        "diagnostics": {
            "router_restore_gap": 0.14,
            "topk_flip_rate": 0.083,
            "gate_weights_changed": 0.64,
            "experts_changed": 24,
            "experts_total": 192,
            "untouched_identical": True,
            "random_control": {"asr": {}, "asr_seen": rate(90, 200), "asr_unseen": rate(36, 100)},
            "stages": [
                effect("repair-1", "refusal_loss", acted=True),
                effect("consistency-1", "routing_gap", acted=False),
            ],
            "drift_per_layer": [
                {"layer": layer, "flip_rate": 0.03 + 0.02 * layer, "kl": 0.004 * layer} for layer in range(6)
            ],
        },
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A fresh folder, to be changed at will."""
    return made(tmp_path / "demo-run")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its report written, to be read only."""
    folder = made(tmp_path_factory.mktemp("finished") / "demo-run")
    html.write(folder)
    return folder


def made(folder: Path) -> Path:
    """Write every artefact of a run."""
    generator = np.random.default_rng(0)
    stages = [folder / "stages" / name for name in ("1-repair-1", "2-consistency-1", "10-repair-5")]
    for stage in stages:
        stage.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (folder / "recipe.yaml").write_text(f"method: rasa\nmodel:\n  name_or_path: tiny-moe\nnote: '{UNSAFE}'\n")
    manifest = {
        "name": "demo-run", "created": "2026-01-01T00:00:00+00:00", "seed": 7,
        "versions": {"routealign": "0.1", "torch": "2.13.0"},
        "stages": {
            "detect": {"status": "finished", "seconds": 41.5, "peak_memory_mb": 900.4},
            "repair-1": {"status": "finished", "seconds": 412.0, "peak_memory_mb": 1500.0, "peak_gpu_memory_mb": 80.0},
            "export": {"status": "started", "seconds": None},
        },
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    outcomes = ["kept"] * 60 + ["jailbreak_failed"] * 7 + ["unjudged"] * 2
    rows = [{"goal": f"goals:{i}", "wrapper": f"templates:{i % 3}", "outcome": o} for i, o in enumerate(outcomes)]
    rows += [{"goal": f"goals:{i}", "outcome": "anchor_refused", "anchor_reply": "NEVER SHOWN"} for i in range(23)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = generator.normal(0, 0.1, (6, 32)) + (generator.random((6, 32)) > 0.9) * 0.4
    frame = pd.DataFrame(
        [(layer, expert, 5, 5, 4, 6, scores[layer, expert]) for layer in range(6) for expert in range(32)],
        columns=["layer", "expert", "a1", "d1", "a2", "d2", "score"],
    )
    frame.to_parquet(folder / "activations.parquet")
    top = frame.nlargest(24, "score")
    members = [
        {"layer": int(r.layer), "expert": int(r.expert), "score": r.score, "stability": 0.95} for r in top.itertuples()
    ]
    experts = {"version": 1, "model": "tiny-moe", "num_layers": 6, "experts_per_layer": {str(i): 32 for i in range(6)}}
    (folder / "expert_set.json").write_text(json.dumps({**experts, "members": members}))
    log = [{"step": s, "loss": 2.0 / s, "retain_loss": 0.3 / s, "learning_rate": 1e-3} for s in range(10, 210, 10)]
    for stage in stages:
        (stage / "log.json").write_text(json.dumps([*log, {"step": 200, "train_loss": 0.5, "train_runtime": 9.0}]))
        (stage / "parameters.json").write_text(
            json.dumps({"trained_parameters": 1769472, "total_parameters": 15_600_000})
        )
    counts = {"kept": 7, "cut": 1, "unfinished": 2, "dropped": {"answered with a refusal": 9}}
    (stages[0] / "rows.json").write_text(json.dumps({"wrapped benign": counts}))
    audit = {"untouched_identical": True, "moved_outside": [], "reload_ok": True, "reload_max_logit_difference": 0.0}
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder
