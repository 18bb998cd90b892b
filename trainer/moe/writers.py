"""What writes to the residual stream: routed experts, shared experts and dense MLPs, token mixers.

Found by what they do, not by their names: in one forward pass, the linear layer whose output *is* the output of its
block. Families that normalise a block's output before they add it (flex_olmo, gemma4) add the normalised write; the
writer is the linear layer before it.

Shapes: D hidden size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.moe.backbone import LOW_TOKENS, Backbone, MoELayer
from trainer.moe.sharding import decoder_layers

Kind = Literal["experts", "shared", "mixer"]
KINDS: tuple[Kind, ...] = ("experts", "shared", "mixer")
"""experts: routed experts. shared: the shared expert of a layer, or the MLP of a dense one. mixer: attention, linear
attention or short convolution."""


@dataclass(frozen=True)
class Writer:
    """A tensor that writes to the residual stream in decoder layer `layer`.

    `weight`, `bias`: names in the model. `is_fused`: a slice per expert along the first dimension. `is_transposed`:
    the weight is [..., F, D] instead of [..., D, F]; a bias is [..., D] either way.
    """

    layer: int
    kind: Kind
    weight: str
    bias: str | None
    is_fused: bool = False
    is_transposed: bool = False


def find_writers(backbone: Backbone) -> list[Writer]:
    """Every writer of a model, by layer and kind. One forward pass of random tokens; collective for a sharded model.

    A model on the meta device computes nothing: there the last linear layer of a block that has D outputs is taken.

    Raises:
        ValueError: a block of a decoder layer has no linear layer whose output is its own; names the block.
    """
    found_blocks = list(blocks(backbone))
    find = _last_by_size if backbone.model.device.type == "meta" else _last_linear
    last = find(backbone, [block for *_, block in found_blocks])
    found = [_of_experts(layer) for layer in backbone]
    for index, kind, name, block in found_blocks:
        if id(block) not in last:
            raise ValueError(
                f"layer {index}: {name} ends in no linear layer, so what writes to the residual stream cannot be told"
            )
        inner, has_bias = last[id(block)]
        linear = f"{name}.{inner}"
        found.append(Writer(index, kind, f"{linear}.weight", f"{linear}.bias" if has_bias else None))
    return sorted(found, key=lambda writer: (writer.layer, KINDS.index(writer.kind)))


def _of_experts(layer: MoELayer) -> Writer:
    experts: Any = layer.experts
    name = f"{layer.experts_name}.down_proj"
    bias = f"{name}_bias" if experts.has_bias else None
    return Writer(layer.index, "experts", name, bias, is_fused=True, is_transposed=bool(experts.is_transposed))


def blocks(backbone: Backbone) -> Iterator[tuple[int, Kind, str, nn.Module]]:
    """(layer, kind, name, module) of every block of a decoder layer besides its routed experts."""
    moe = {layer.index: layer for layer in backbone}
    layers = list(decoder_layers(backbone).items())
    # A dense layer's MLP has the name that the block with the experts has in others.
    mlps = {
        name
        for index, (_, module) in enumerate(layers)
        if index in moe
        for name, child in module.named_children()
        if moe[index].experts in child.modules()
    }
    for index, (layer_name, module) in enumerate(layers):
        layer = moe.get(index)
        if layer is not None and layer.shared is not None:
            assert layer.shared_name is not None
            yield index, "shared", layer.shared_name, layer.shared
        for name, child in module.named_children():
            taken = layer is not None and (
                layer.experts in child.modules() or child is layer.shared or child is layer.router
            )
            holds = any(isinstance(inner, nn.Linear) for inner in child.modules())
            if holds and not taken and not isinstance(child, nn.Linear):
                yield index, "shared" if name in mlps else "mixer", f"{layer_name}.{name}", child


def _last_by_size(backbone: Backbone, blocks: Sequence[nn.Module]) -> dict[int, tuple[str, bool]]:
    """`_last_linear` by the sizes of the layers alone."""
    size = backbone.model.config.get_text_config().hidden_size
    return {
        id(block): (name, linear.bias is not None)
        for block in blocks
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear) and linear.out_features == size
    }


@torch.no_grad()
def _last_linear(backbone: Backbone, blocks: Sequence[nn.Module]) -> dict[int, tuple[str, bool]]:
    """id of a block -> (name within it, has a bias) of the linear layer whose output is the block's."""
    model = backbone.model
    written: dict[int, Tensor] = {}
    handles = []

    def keep(module: nn.Module, _args: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            written[id(module)] = first

    linears = {
        id(block): [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)] for block in blocks
    }
    for module in [*blocks, *(module for of_block in linears.values() for _, module in of_block)]:
        handles.append(module.register_forward_hook(keep))
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.get_input_embeddings().weight.shape[0] or LOW_TOKENS, LOW_TOKENS)
    ids = torch.randint(vocabulary, (2, 8), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {}
    for block in blocks:
        whole = written.get(id(block))
        for name, linear in linears[id(block)]:
            one = written.get(id(linear))
            if whole is not None and one is not None and _same(whole, one):
                found[id(block)] = (name, linear.bias is not None)
    return found


def _same(whole: Tensor, one: Tensor) -> bool:
    """Whether both are one result."""
    return whole is one or (whole.numel() == one.numel() and torch.equal(whole.reshape(-1), one.reshape(-1)))
