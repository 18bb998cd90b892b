"""What a stage holds before any engine splits it: weights as loaded, what trains, the optimiser's states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.moe.backbone import Backbone, MoELayer, expert_tensor_names
from trainer.moe.quantised import packable
from trainer.moe.sharding import units
from trainer.moe.trainable import Trained
from trainer.planning.workload import optimiser
from trainer.recipe.schema import ConsistencySection, Recipe, RepairSection

FP32 = 4
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


@dataclass(frozen=True)
class Held:
    """Bytes of a model in a stage. `elements`: the number of trained parameters.

    `twins`: the original routers and shared experts, which no engine splits. `unit`: the largest part that is gathered
    as one. `small`: tensors that ZeRO-3 never splits. `kept_views`: fused experts of which autograd keeps a transposed
    view, so that ZeRO-3 frees a gathered one only after the backward pass. `dequantised`: the largest layer unpacked,
    0 where nothing is packed. `gradients`: of everything that trains. `states`, `states_fp32`: of the optimiser on
    the parameters, and on fp32 copies of them.
    """

    weights: int
    weight_elements: int
    twins: int
    unit: int
    small: int
    kept_views: int
    dequantised: int = 0
    elements: int = 0
    gradients: int = 0
    states: int = 0
    states_fp32: int = 0


def measure(
    backbone: Backbone, recipe: Recipe, trained: Trained | None, section: RepairSection | ConsistencySection | None
) -> Held:
    """Sizes of a model on the meta device; with `section`, of the stage that trains what requires gradients."""
    model = backbone.model
    parameters = list(model.parameters())
    packed = _packed(backbone) if recipe.model.quantization is not None else set()
    factor = PACKED.get(recipe.model.quantization or "", 0.0)
    sizes = {id(p): round(p.numel() * factor) if id(p) in packed else p.numel() * p.element_size() for p in parameters}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    layers = units(backbone)
    training = [p for p in parameters if section is not None and p.requires_grad]
    elements = sum(p.numel() for p in training)
    state, by_byte = OPTIMISERS.get(optimiser(section), (2, True)) if section is not None else (0, False)
    originals = [p for module in trained.originals for p in module.parameters()] if trained is not None else []
    return Held(
        weights=sum(sizes.values()) + buffers,
        weight_elements=sum(p.numel() for p in parameters),
        twins=sum(_bytes(p) for p in originals),
        unit=max(sum(sizes[id(p)] for p in layer.parameters()) for layer in layers),
        small=sum(sizes[id(p)] for p in parameters if p.numel() <= PERSISTENT),
        kept_views=0 if packed else sum(_experts(layer) for layer in backbone if not layer.experts.is_transposed),
        dequantised=max(sum(_bytes(p) for p in layer.parameters()) for layer in layers) if packed else 0,
        elements=elements,
        gradients=sum(_bytes(p) for p in training),
        states=round(sum(state * (_bytes(p) if by_byte else p.numel()) for p in training)),
        states_fp32=round(elements * state * (FP32 if by_byte else 1)),
    )


def _experts(layer: MoELayer) -> int:
    return sum(_bytes(getattr(layer.experts, name)) for name in expert_tensor_names(layer.experts))


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _packed(backbone: Backbone) -> set[int]:
    """The tensors that `moe.quantised.quantise` packs."""
    modules = (module for _, chosen in packable(backbone) for module in chosen)
    return {id(getattr(module, name)) for module, names in modules for name in names}
