"""A gpt-oss checkpoint stored in MXFP4, as it is published: fp4 values in blocks of 32 that share a scale."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pack(folder: Path) -> dict[str, Tensor]:
    """Give the experts of a tiny gpt_oss checkpoint random packed weights; returns what they unpack to, by name."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config |= {"hidden_size": 32, "intermediate_size": 32, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    wanted = {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width = state.pop(name).shape[0], 64 if name.endswith("gate_up_proj") else 32
        state[name + "_bias"] = torch.zeros(experts, width, dtype=torch.bfloat16)
        blocks_EOGB = torch.randint(0, 256, (experts, width, 1, 16), dtype=torch.uint8)
        scales_EOG = torch.randint(125, 130, (experts, width, 1), dtype=torch.uint8)
        state |= {name + "_blocks": blocks_EOGB, name + "_scales": scales_EOG}
        halves = torch.stack([blocks_EOGB & 15, blocks_EOGB >> 4], -1).flatten(-2).long()
        values = torch.tensor(FP4)[halves] * 2.0 ** (scales_EOG.float() - 127).unsqueeze(-1)
        wanted[name] = values.flatten(2).transpose(1, 2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return wanted
