"""What reading a checkpoint takes in each process: `python -m tests.distributed.reading FOLDER` under a launcher."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.planning.measure import resident
from trainer.engines.engine import engine
from trainer.recipe.sections import ModelSection
from trainer.runtime.processes import PeakMemory, from_rank_0, rank


def main(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    made = engine()
    made.shard(made.load(ModelSection(name_or_path=str(checkpoint / "tiny")))[0])  # libraries load on first use
    gc.collect()
    from_rank_0(None)
    baseline, peak = resident() / 2**20, PeakMemory()
    backbone, _ = made.load(ModelSection(name_or_path=str(checkpoint / "model")))
    made.shard(backbone)
    found = {"peak_mib": peak.read()["peak_memory_mb"] - baseline}
    group = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    found["patience_s"] = group.options._timeout.total_seconds()
    (checkpoint / f"rank-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
