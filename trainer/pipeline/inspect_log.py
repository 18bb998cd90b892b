"""Kept replies as a log that Inspect reads (`inspect view`): one file a measurement, beside the replies.

The format is `EvalLog` of github.com/UKGovernmentBEIS/inspect_ai, `src/inspect_ai/log/_log.py`, version 2 as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainer.evaluation.agreement import VERDICTS
from trainer.pipeline.replies import FOLDER, KeptReply, measurements, private, read_replies
from trainer.run.manifest import Manifest
from trainer.runtime.console import is_main_process, say

VERSION = 2


def write_inspect_logs(run: Path) -> list[Path]:
    """Write a log of every measurement whose replies a run kept; each is readable by this user alone.

    Raises:
        UserError: no run, or none of its replies were kept.
    """
    recipe = Manifest.read(run).recipe
    model, judge = recipe["model"]["name_or_path"], recipe.get("evaluate", {}).get("judge", "phrases")
    written = []
    for label, path in measurements(run).items():
        # The time of the replies, so that the same replies make the same log.
        created = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
        log = _log(label, created, model, judge, read_replies(path))
        # As Inspect names its own: it lists what is called so.
        out = run / FOLDER / "inspect" / f"{created.replace(':', '-')}_{label}_{log['eval']['task_id']}.json"
        if is_main_process():
            with private(out) as file:
                json.dump(log, file, ensure_ascii=False)
            say(f"written: {out}, for this user alone")
        written.append(out)
    return written


def _log(label: str, created: str, model: str, judge: str, kept: Sequence[KeptReply]) -> dict[str, Any]:
    samples = [_sample(i, model, judge, one) for i, one in enumerate(kept)]
    counted = Counter(one.row.verdict for one in kept)
    shares = {verdict: {"name": verdict, "value": counted[verdict] / len(kept)} for verdict in VERDICTS}
    about = hashlib.sha256(f"{label} {created} {model}".encode()).hexdigest()[:22]
    return {
        "version": VERSION,
        "status": "success",
        "eval": {
            "created": created,
            "task": label,
            "task_id": about,
            "run_id": about,
            "dataset": {"name": label, "samples": len(kept), "sample_ids": [sample["id"] for sample in samples]},
            "model": model,
            "config": {},
        },
        "plan": {"name": "plan", "steps": [], "config": {}},
        "results": {
            "total_samples": len(kept),
            "completed_samples": len(kept),
            "scores": [{"name": judge, "scorer": judge, "params": {}, "metrics": shares}],
        },
        "stats": {"started_at": created, "completed_at": created, "model_usage": {}},
        "samples": samples,
    }


def _sample(number: int, model: str, judge: str, one: KeptReply) -> dict[str, Any]:
    row = one.row
    asked = one.asked.messages()
    answer = {"role": "assistant", "content": one.asked.opening + one.reply.text, "source": "generate"}
    stopped = "stop" if row.finished is not False else "max_tokens"
    return {
        "id": f"{number}:{row.prompt}" + (f" in {row.wrapper}" if row.wrapper else ""),
        "epoch": 1,
        "input": asked,
        "target": "",
        "messages": [*asked, answer],
        "output": {"model": model, "choices": [{"message": answer, "stop_reason": stopped}]},
        "scores": {judge: {"value": row.verdict, "answer": one.reply.text}},
        "metadata": {
            "group": row.group,
            "family": row.family,
            "role": row.role,
            "opening": one.asked.opening,
            "degenerate": row.degenerate,
        },
    }
