"""What a stage holds before any engine splits it: weights as loaded, what trains, the optimiser's states."""

from __future__ import annotations

from torch import Tensor

from trainer.engines.memory import FP32, StageSizes
from trainer.moe.backbone import Backbone, MoELayer, expert_tensor_names
from trainer.moe.quantised import packable
from trainer.moe.sharding import units
from trainer.planning.planned import Held
from trainer.planning.workload import optimiser
from trainer.recipe.section import TrainerSection

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 leaves a tensor whole; DeepSpeed's default."""

# Bytes for a weight packed by bitsandbytes: its bits, and one fp32 scale for each block of 64 or 256.
PACKED = {"4bit": 0.5 + 4 / 64, "8bit": 1 + 4 / 256}

# Bytes of optimiser state for each byte (True) or element (False) of what trains.
OPTIMISERS: dict[str, tuple[float, bool]] = {
    "adamw_torch": (2, True),
    "adamw_torch_fused": (2, True),
    "adamw_bnb_8bit": (2, False),
    "adamw_8bit": (2, False),
    "paged_adamw_8bit": (2, False),
    "adamw_torch_8bit": (2, False),
    "adamw_torch_4bit": (1, False),
    "paged_adamw_32bit": (8, False),
    "lion_32bit": (4, False),
    "paged_lion_32bit": (4, False),
    "lion_8bit": (1, False),
    "paged_lion_8bit": (1, False),
    "rmsprop": (1, True),
    "adagrad": (1, True),
    "adafactor": (0, False),  # a row and a column for each matrix
    "sgd": (0, False),
}


def measure(held: Held, quantization: str | None = None, section: TrainerSection | None = None) -> StageSizes:
    """Sizes of what a stage holds, on the meta device; `section`: of a stage that trains what requires gradients."""
    backbone = held if isinstance(held, Backbone) else held.backbone
    model = backbone.model
    parameters = list(model.parameters())
    packed = _packed(backbone) if quantization is not None else set()
    factor = PACKED.get(quantization or "", 0.0)
    sizes = {id(p): round(p.numel() * factor) if id(p) in packed else _bytes(p) for p in parameters}
    layers = units(backbone)
    asked = [p for p in parameters if p.requires_grad]
    training = asked if section is not None else []
    elements = sum(p.numel() for p in training)
    state, by_byte = OPTIMISERS.get(optimiser(section), (2, True)) if section is not None else (0, False)
    twins, copied = _originals(held)
    return StageSizes(
        weights=sum(sizes.values()) + sum(_bytes(b) for b in model.buffers()),
        weight_elements=sum(p.numel() for p in parameters),
        twins=twins,
        copied=copied,
        unit=max(sum(sizes[id(p)] for p in layer.parameters()) for layer in layers),
        small=sum(sizes[id(p)] for p in parameters if p.numel() <= PERSISTENT),
        kept_views=0 if packed else sum(_experts(layer) for layer in backbone if not layer.experts.is_transposed),
        dequantised=max(sum(_bytes(p) for p in layer.parameters()) for layer in layers) if packed else 0,
        elements=elements,
        gradients=sum(_bytes(p) for p in asked),
        states=round(sum(state * (_bytes(p) if by_byte else p.numel()) for p in training)),
        states_fp32=round(elements * state * (FP32 if by_byte else 1)),
    )


def _originals(held: Held) -> tuple[int, int]:
    """Bytes of the original weights beside the model: of single modules, and of a second model."""
    if isinstance(held, Backbone):
        return 0, 0
    twins = sum(_bytes(p) for module in held.originals for p in module.parameters())
    with held.original() as original:
        second = original.model
    if second is held.model:
        return twins, 0
    return twins, sum(_bytes(tensor) for tensor in (*second.parameters(), *second.buffers()))


def _experts(layer: MoELayer) -> int:
    return sum(_bytes(getattr(layer.experts, name)) for name in expert_tensor_names(layer.experts))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _packed(backbone: Backbone) -> set[int]:
    """The tensors that `moe.quantised.quantise` packs."""
    modules = (module for _, chosen in packable(backbone) for module in chosen)
    return {id(getattr(module, name)) for module, names in modules for name in names}
