"""Loads checkpoints in a Python that knows transformers and not this project; started by the tests as a script.

Usage: python -I -S reload_worker.py SITE_PACKAGES, then one folder per line of standard input. Reads `ids.safetensors`
there, writes the model's logits on it to `logits.safetensors` and answers "ok" or the error, one line each.
"""

import json
import sys
from pathlib import Path

sys.path.append(sys.argv[1])  # without `site`, so that an editable installation of this project is not found

import importlib.util

import torch
import transformers
from safetensors.torch import load_file, save_file

assert importlib.util.find_spec("trainer") is None and importlib.util.find_spec("data_prep") is None
torch.set_num_threads(1)


@torch.no_grad()
def write_logits(folder: Path) -> None:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    for parameter in model.parameters():
        # Matrix products on memory-mapped weights round otherwise than on aligned ones.
        parameter.data = parameter.data.clone()
    ids = load_file(folder / "ids.safetensors")["ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


for line in sys.stdin:
    try:
        write_logits(Path(line.strip()))
        answer = "ok"
    except Exception as error:  # noqa: BLE001 - told to the test that asked
        answer = f"{type(error).__name__}: {error}".replace("\n", " ")
    print(answer, flush=True)
