"""Hold a model's frozen weights in 4-bit NF4 or 8-bit blocks while critical experts, LoRA and routers train.

Loaders quantise linear layers and pass over fused expert tensors [E, ...], which are most of an MoE. Here both become
packed bytes under a torch parametrisation that gives the tensor back, dequantised, when a forward asks for it. First
`SplitModel(...)`, then `quantise(...)`: so the critical experts are copies of the *unquantised* tensors.

Packing loses information, so a checkpoint is never made of a quantised model: `fuse_into` puts what was trained into
an unquantised copy.

Source: QLoRA (arXiv 2305.14314) for NF4, arXiv 2110.02861 for 8-bit blocks; both from bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from trainer.moe.backbone import Backbone, expert_tensor_names
from trainer.moe.experts import CHILD, SplitModel

Kind = Literal["4bit", "8bit"]


class Packed(nn.Module):
    """The parametrisation of one tensor: packed bytes in, the tensor in its own shape and type out."""

    def __init__(self, kind: Kind, state: Any, shape: torch.Size):
        super().__init__()
        self.kind, self.state, self.shape = kind, state, shape

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        from bitsandbytes import functional

        dequantise = functional.dequantize_4bit if self.kind == "4bit" else functional.dequantize_blockwise
        return dequantise(packed, self.state).view(self.shape)


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of the model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def quantise(backbone: Backbone, kind: Kind, device: torch.device) -> None:
    """Move a model to `device` and pack the frozen matrices of its decoder layers there, one layer at a time.

    Packed: the fused expert tensors and the linear layers (attention, shared experts, dense layers). Left as they are:
    routers and other gates, critical experts and LoRA, what trains beside them, norms, biases, convolutions,
    embeddings, the head. At no time does `device` hold more than one whole layer besides the packed ones.

    Raises:
        ValueError: bitsandbytes is not installed, or the model is quantised already.
    """
    _needs_bitsandbytes()
    if is_quantised(backbone.model):
        raise ValueError("the model is quantised already")
    for decoder_layer, chosen in packable(backbone):
        decoder_layer.to(device)
        for module, names in chosen:
            _pack(module, names, kind)
    backbone.model.to(device)


def packable(backbone: Backbone) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, list[str]]]]]:
    """Every decoder layer with the modules in it of which `quantise` packs tensors, and the names of these."""
    left = {id(inner) for layer in backbone for inner in layer.router.modules()}
    left |= {id(module) for module in backbone.beside.values()}
    for layer in backbone:
        left |= {id(inner) for inner in getattr(layer.experts, CHILD, nn.Identity()).modules()}
    fused = {id(layer.experts) for layer in backbone}
    for decoder_layer in _decoder_layers(backbone):
        chosen: list[tuple[nn.Module, list[str]]] = []
        for module in decoder_layer.modules():
            if id(module) in fused:
                chosen.append((module, [n for n in expert_tensor_names(module) if getattr(module, n).ndim == 3]))
            # One output is a gate: qwen's shared_expert_gate.
            elif type(module) is nn.Linear and id(module) not in left and module.out_features > 1:
                chosen.append((module, ["weight"]))
        yield decoder_layer, chosen


def _needs_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("quantisation needs bitsandbytes: pip install 'routealign[gpu]'") from None


def _decoder_layers(backbone: Backbone) -> list[nn.Module]:
    """The layers of the stack that holds the experts, dense ones too; a vision tower is another stack."""
    experts = {id(layer.experts) for layer in backbone}
    stacks = [module for module in backbone.model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for stack in stacks if any(id(m) in experts for m in stack.modules()) for layer in stack]


@torch.no_grad()
def _pack(module: nn.Module, names: list[str], kind: Kind) -> None:
    """Replace parameters of a module by packed ones; `module.<name>` still reads as the tensor."""
    from bitsandbytes import functional

    for name in names:
        whole: Tensor = getattr(module, name).detach()
        # Flat: bitsandbytes' CPU kernel (0.50.2) gives wrong values where a row is no whole number of blocks.
        flat = whole.reshape(-1)
        if kind == "4bit":
            packed, state = functional.quantize_4bit(flat, quant_type="nf4")
        else:
            packed, state = functional.quantize_blockwise(flat, blocksize=256)
        parameter = nn.Parameter(packed, requires_grad=False)
        parameter.whole_numel = whole.numel()  # type: ignore[attr-defined]
        setattr(module, name, parameter)
        # unsafe: torch would insist that the packed bytes have the shape and type of the tensor.
        parametrize.register_parametrization(module, name, Packed(kind, state, whole.shape), unsafe=True)
    _dequantise_once_per_forward(module)


def _dequantise_once_per_forward(module: nn.Module) -> None:
    """A forward that reads a tensor twice, or only its shape, dequantises it once."""
    opened: list[ExitStack] = []

    def begin(_module: nn.Module, _args: object) -> None:
        opened.append(ExitStack())
        opened[-1].enter_context(parametrize.cached())

    def end(_module: nn.Module, _args: object, _output: object) -> None:
        if opened:
            opened.pop().close()

    module.register_forward_pre_hook(begin)
    # always_call: checkpointing leaves the recomputed forward early, and the cache would never be emptied again.
    module.register_forward_hook(end, always_call=True)


def fuse_into(base: Backbone, split: SplitModel, lora_alpha: float | None = None) -> PreTrainedModel:
    """What `split` trained, fused into `base`, an unquantised copy of the model it was made of.

    Tensors that no repair touches stay those of `base`, bit for bit. `base` is changed in place and returned.

    Args:
        lora_alpha: as given to `split`.

    Raises:
        ValueError: `base` is another model, or itself quantised or split.
    """
    if is_quantised(base.model):
        raise ValueError("the base is quantised: a fused checkpoint would keep what packing lost")
    beside = {name: base.model.get_submodule(name) for name in split.backbone.beside}
    repaired = SplitModel(base, split.expert_set, lora_rank=split.lora_rank, lora_alpha=lora_alpha, beside=beside)
    repaired.load_state_dict(split.state_dict())
    repaired.fuse()
    return base.model
