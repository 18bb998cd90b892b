"""Steer a router: force chosen experts into every token's top-k and keep others out (SteerMoE, arXiv 2509.09660).

Per token and before top-k, `s = log_softmax(z)` in fp32; the largest and smallest score are taken before any change;
an activated expert gets `s_max + eps`, a deactivated one `s_min - eps`; the model's own top-k and weighting follow. In
bf16 the margin of .01 would round away.

Routers that choose by something else than their logits (a selection bias, groups) or whose weights are not
shift-invariant (sigmoid, sparsemixer) would change for experts nobody named. There the *selection* alone is forced and
the weights come from the untouched logits.

Shapes: T tokens (batch x positions, padding included), E experts, K chosen experts per token, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.moe.backbone import Backbone, MoELayer, RouterOutput
from trainer.moe.layouts import SELECTION_ONLY
from trainer.moe.routing import record
from trainer.moe.steering_gate import Gate, Rows

EPS = 0.01
PROBE_TOKENS = (8, 16)
"""Sequences and positions of the random tokens on which a router's way of choosing is found out."""


@dataclass(frozen=True)
class Steering:
    """Which experts are forced, and how hard.

    `activate` and `deactivate` map a decoder-layer index to expert indices. `strength` 1 is the paper's forcing, 0
    leaves the model untouched to the bit; between, each named expert's score lies that share of the way from its own
    to the forced one, so that its rank among the untouched experts moves one way only as the strength grows.

    Raises:
        ValueError: an expert in both sets or named twice, or a strength outside [0, 1].
    """

    activate: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    deactivate: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    strength: float = 1.0
    eps: float = EPS

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"steering: strength {self.strength} is outside 0 (untouched) to 1 (forced)")
        if not self.eps > 0.0:
            raise ValueError(f"steering: eps {self.eps} must be above 0, or forced experts tie with others")
        for name, experts in (("activate", self.activate), ("deactivate", self.deactivate)):
            for layer, members in experts.items():
                if len(set(members)) < len(members):
                    raise ValueError(f"steering: layer {layer} names an expert twice in {name}: {sorted(members)}")
        for layer in self.activate.keys() & self.deactivate.keys():
            both = sorted(set(self.activate[layer]) & set(self.deactivate[layer]))
            if both:
                raise ValueError(f"steering: expert {both[0]} of layer {layer} is in both activate and deactivate")

    @property
    def layers(self) -> list[int]:
        """Decoder layers with a named expert, ascending."""
        named = (self.activate, self.deactivate)
        return sorted({layer for experts in named for layer, members in experts.items() if members})

    def check(self, experts_per_layer: Mapping[int, int], top_k: Mapping[int, int]) -> None:
        """Whether a model of these sizes (by decoder layer) can be steered so.

        Raises:
            ValueError: a layer or expert it does not have, more activated experts in a layer than its top-k, or so
                many deactivated ones that top-k would have to choose among them.
        """
        for layer in self.layers:
            if layer not in experts_per_layer:
                raise ValueError(f"steering: layer {layer} has no experts; MoE layers: {sorted(experts_per_layer)}")
            experts, k = experts_per_layer[layer], top_k[layer]
            on, off = self.activate.get(layer, ()), self.deactivate.get(layer, ())
            for expert in (*on, *off):
                if not 0 <= expert < experts:
                    raise ValueError(f"steering: expert {expert} of layer {layer} does not exist: 0..{experts - 1}")
            if len(on) > k:
                raise ValueError(f"steering: layer {layer} activates {len(on)} experts, its router chooses only {k}")
            if len(off) > experts - k:
                raise ValueError(
                    f"steering: layer {layer} deactivates {len(off)} of {experts} experts; at most {experts - k}, or "
                    f"its top {k} would have to choose among them"
                )


@contextmanager
def steer(backbone: Backbone, steering: Steering, gate: Gate | None = None) -> Iterator[None]:
    """Steer every forward pass of the model inside: prompts and generated tokens, any batch, any dtype.

    With a `gate` only the sequences of a batch that it fires on are steered. It judges at prefill, on the last prompt
    token of the model as it is, by one more forward pass over the prompt; the verdict holds while a cache is filled.
    `record` inside still sees the routers' own decisions, `applied` the steered ones. Opening the context runs a few
    random tokens, to find out how the routers choose.

    Raises:
        ValueError: steering or a gate that does not fit the model, or a router whose scoring family is unknown.
    """
    steering.check(
        {layer.index: layer.num_experts for layer in backbone}, {layer.index: layer.top_k for layer in backbone}
    )
    layers = [backbone.layer(index) for index in steering.layers]
    unknown = [layer.router_name for layer in layers if layer.scoring is None]
    if unknown:
        raise ValueError(f"steer: scoring family of {unknown[0]} is unknown (run Backbone.check first)")
    if steering.strength == 0.0 or not layers:
        yield
        return
    rows = Rows(backbone, gate) if gate else None
    choices = _choices(backbone, layers)
    handles = [
        layer.router.register_forward_hook(_hook(layer, steering, choices[layer.index], rows)) for layer in layers
    ]
    if rows:
        handles += rows.hooks()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def applied(backbone: Backbone) -> Iterator[dict[int, list[Tensor]]]:
    """The experts that really run: by layer, the indices [T, K] handed to the experts in each forward pass inside."""
    index_TK: dict[int, list[Tensor]] = {layer.index: [] for layer in backbone}

    def hook_of(layer: MoELayer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point())
            index_TK[layer.index].append(next(t for t in given if t.shape[-1] == layer.top_k).detach())

        return hook

    handles = [layer.experts.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in backbone]
    try:
        yield index_TK
    finally:
        for handle in handles:
            handle.remove()


# --- how a router chooses -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """How to score the experts of one router so that the top-k of the scores are its own choice.

    `by_logits`: top-k of the logits and shift-invariant weights, the paper's case. Otherwise the scores are
    probabilities plus the router's selection bias, and where that is not the whole rule either (groups), the router's
    own choice is lifted above the rest; an expert that takes a deactivated one's place is then the best of all others.
    """

    by_logits: bool
    bias_E: Tensor | None = None
    lifted: bool = False

    def scores(self, layer: MoELayer, logits_TE: Tensor, index_TK: Tensor) -> Tensor:
        """Selection scores [T, E], fp32."""
        assert layer.scoring is not None
        if self.bias_E is None:
            scores_TE = logits_TE.float()  # log_softmax would shift all of a token's scores alike: nothing changes
        else:
            float_TE = logits_TE.float()
            probabilities_TE = float_TE.softmax(-1) if layer.scoring.shift_invariant else float_TE.sigmoid()
            scores_TE = probabilities_TE + self.bias_E.to(probabilities_TE)
        if not self.lifted:
            return scores_TE
        above_T1 = scores_TE.amax(-1, keepdim=True) - scores_TE.amin(-1, keepdim=True) + 1.0
        chosen_TE = torch.zeros_like(scores_TE).scatter(-1, index_TK.long(), 1.0)
        return scores_TE + chosen_TE * above_T1


@torch.no_grad()
def _choices(backbone: Backbone, layers: list[MoELayer]) -> dict[int, _Choice]:
    """The rule of each router, found by reproducing its own choice on random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(backbone.model.get_input_embeddings().weight.shape[0], 1000)
    ids = torch.randint(vocabulary, PROBE_TOKENS, generator=generator).to(backbone.model.device)
    modes = [(module, module.training) for module in backbone.model.modules()]
    backbone.model.eval()
    try:
        with record(backbone) as trace:
            backbone.model(input_ids=ids, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode
    found = {}
    for layer in layers:
        assert layer.scoring is not None
        bias_E = _selection_bias(backbone, layer)
        logits_TE, index_TK = trace.logits_TE[layer.index], trace.index_TK[layer.index]
        plain = _Choice(bias_E is None and layer.scoring.shift_invariant, bias_E)
        scores_TE = plain.scores(layer, logits_TE, index_TK)
        worst_T = scores_TE.gather(-1, index_TK.long()).amin(-1)
        best_other_T = scores_TE.scatter(-1, index_TK.long(), float("-inf")).amax(-1)
        own = bool((worst_T >= best_other_T - 1e-6).all())  # bf16 logits tie often, and any order of ties is right
        found[layer.index] = plain if own else _Choice(False, bias_E, lifted=True)
    return found


def _selection_bias(backbone: Backbone, layer: MoELayer) -> Tensor | None:
    """The tensor [E] that a router adds to its scores for choosing only; in the router, or beside it in the block."""
    block = backbone.model.get_submodule(layer.router_name.rpartition(".")[0])
    named = [*layer.router.named_parameters(), *layer.router.named_buffers()]
    for _, module in block.named_children():
        if module is not layer.experts:
            named += [*module.named_parameters(), *module.named_buffers()]
    named += [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    biases = [t for name, t in named if name.endswith(SELECTION_ONLY) and t.numel() == layer.num_experts]
    return biases[0].detach().float().reshape(-1) if biases else None


def _hook(
    layer: MoELayer, steering: Steering, choice: _Choice, rows: Rows | None
) -> Callable[..., RouterOutput | None]:
    device = next(layer.router.parameters()).device
    on_E, off_E = (
        _mask(experts.get(layer.index, ()), layer.num_experts, device)
        for experts in (steering.activate, steering.deactivate)
    )
    scoring, k, eps, strength = layer.scoring, layer.top_k, steering.eps, steering.strength
    assert scoring is not None

    def hook(_module: nn.Module, _args: object, output: RouterOutput) -> RouterOutput | None:
        if rows and rows.judging:
            return None
        logits_TE, weights_TK, index_TK = layer.read(output)
        scores_TE = choice.scores(layer, logits_TE, index_TK)
        lowest_T1, highest_T1 = scores_TE.aminmax(dim=-1, keepdim=True)
        changed_TE = scores_TE
        if on_E is not None:
            changed_TE = torch.where(on_E, highest_T1 + eps, changed_TE)
        if off_E is not None:
            changed_TE = torch.where(off_E, lowest_T1 - eps, changed_TE)
        if strength < 1.0:
            changed_TE = torch.lerp(scores_TE, changed_TE, strength)
        chosen_TK = changed_TE.topk(k, dim=-1).indices
        forced_TK = scoring.weights(changed_TE if choice.by_logits else logits_TE, chosen_TK).to(weights_TK.dtype)
        chosen_TK = chosen_TK.to(index_TK.dtype)
        if rows:
            on_T1 = rows.tokens(len(index_TK))
            forced_TK = torch.where(on_T1, forced_TK, weights_TK)
            chosen_TK = torch.where(on_T1, chosen_TK, index_TK)
        return output[0], forced_TK, chosen_TK

    return hook


def _mask(experts: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor | None:
    if not experts:
        return None
    mask_E = torch.zeros(num_experts, dtype=torch.bool, device=device)
    mask_E[list(experts)] = True
    return mask_E
