"""What one process of a pass does: `python -m tests.methods.alignx.worker OUT` under a launcher."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.methods.alignx.test_passes import fresh, run
from trainer.engines.engine import engine
from trainer.methods.alignx.adapters import Adapter
from trainer.runtime.processes import leave, rank, world_size

if __name__ == "__main__":
    torch.set_num_threads(1)
    engine()
    out = Path(sys.argv[1])
    adapters = fresh(per_device_train_batch_size=4 // world_size(), warmup_steps=0)
    run(adapters, out)
    state = Adapter(adapters, "helpful").state_dict()
    if rank() == 0:
        save_file(state, out / "adapter.safetensors")
    leave()
