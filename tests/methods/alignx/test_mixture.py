"""The mixture against its adapters: what one-hot weights, padding, order and an untrained head must not change."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from data_prep.errors import UserError
from tests.tiny import NUM_LAYERS, tiny_model, token_ids
from trainer.evaluation.generation import left_pad
from trainer.methods.alignx.adapters import Adapter, AxisAdapters
from trainer.methods.alignx.features import Views
from trainer.methods.alignx.head.head import MoCaE
from trainer.methods.alignx.mixture import Mixture, Mode, Uniform
from trainer.methods.alignx.recipe import AdaptersSection, FeaturesSection
from trainer.moe.backbone import Backbone

AXES = ("helpful", "harmless", "honest")
FAMILIES = ("olmoe", "gpt_oss", "llama")
TARGETS = ["q_proj", "v_proj"]


class Fixed(Uniform):
    """A head that always says the same."""

    def __init__(self, alpha_A: list[float]):
        self.alpha_A = torch.tensor(alpha_A)

    def alpha(self, features_BVD: Tensor) -> Tensor:
        return self.alpha_A.expand(features_BVD.shape[0], -1)


def built(family: str) -> PreTrainedModel:
    if family != "llama":
        return tiny_model(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=NUM_LAYERS, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(config).eval()


def adapted(family: str = "olmoe") -> AxisAdapters:
    """Adapters that do something: B is zero when PEFT makes it."""
    backbone = Backbone.of(built(family), takes_dense=True).check()
    adapters = AxisAdapters(backbone, AXES, AdaptersSection(r=4, alpha=8, dropout=0.0, targets=TARGETS), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name in AXES:
        for parameter in adapters.parameters(name).values():
            parameter.data.normal_(0, 0.3, generator=draw)
    return adapters


def views_of(adapters: AxisAdapters, layer: int | None = None, position: str = "last") -> Views:
    return Views(adapters, AXES, FeaturesSection(layer=layer, position=cast(Any, position)))


@torch.no_grad()
def said(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """Tokens of a greedy reply, and the logits that they were chosen by [B, N, V]."""
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    found = model.generate(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    return found.sequences[:, ids_BS.shape[1] :], torch.stack(found.logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", range(3))
def test_one_hot_weights_are_that_adapter(family: str, chosen: int) -> None:
    """Bit for bit in `hidden`, within 1e-6 of the logits' size in `weights` and `top1`.

    The random gpt_oss makes ten times as much of rounding: sums in another order differ by that much there.
    """
    adapters, ids_BS = adapted(family), token_ids()
    tolerance = 1e-5 if family == "gpt_oss" else 1e-6
    with adapters.acting(AXES[chosen]):
        tokens_BN, logits_BNV = said(adapters.model, ids_BS)
    _, base_BNV = said(adapters.model, ids_BS)
    assert not torch.allclose(base_BNV, logits_BNV, atol=1e-2), "the adapter does something"
    head = Fixed([float(i == chosen) for i in range(3)])
    for mode in ("hidden", "weights", "top1"):
        mixed_BN, mixed_BNV = said(Mixture(views_of(adapters), head, cast(Mode, mode)), ids_BS)
        assert torch.equal(mixed_BN, tokens_BN)
        if mode == "hidden":
            assert torch.equal(mixed_BNV, logits_BNV)
        else:
            torch.testing.assert_close(mixed_BNV, logits_BNV, rtol=0, atol=tolerance * float(logits_BNV.abs().max()))


def test_hidden_is_the_sum_of_the_last_hidden_states_by_weight() -> None:
    adapters, ids_BS = adapted(), token_ids()
    alpha = [0.2, 0.5, 0.3]
    decoder = cast(Any, adapters.model).get_decoder()
    states = []
    for axis in AXES:
        with adapters.acting(axis), torch.no_grad():
            states.append(decoder(input_ids=ids_BS, use_cache=False).last_hidden_state)
    mixed_BSD = sum(a * state for a, state in zip(alpha, states, strict=True))
    expected_BSV = cast(Any, adapters.model).lm_head(mixed_BSD)
    with torch.no_grad():
        logits_BSV = Mixture(views_of(adapters), Fixed(alpha), "hidden")(ids_BS, use_cache=False).logits
    torch.testing.assert_close(logits_BSV, expected_BSV, atol=1e-5, rtol=1e-5)


def test_weights_is_the_model_with_the_weighted_task_vectors_merged() -> None:
    """Against a merge that shares no code with PEFT's forward."""
    adapters, ids_BS, alpha = adapted(), token_ids(), [0.2, 0.5, 0.3]
    _, logits_BNV = said(Mixture(views_of(adapters), Fixed(alpha), "weights"), ids_BS)
    for layer in adapters.layers.values():
        delta = sum(a * adapters.delta(layer, axis) for a, axis in zip(alpha, AXES, strict=True))
        layer.get_base_layer().weight.data += delta
    _, merged_BNV = said(adapters.model, ids_BS)
    torch.testing.assert_close(logits_BNV, merged_BNV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["weights", "top1", "hidden"])
def test_an_untrained_head_is_the_plain_mixture(mode: Mode) -> None:
    adapters, ids_BS = adapted(), token_ids()
    untrained = MoCaE(AXES, 32, 256)
    tokens_BN, logits_BNV = said(Mixture(views_of(adapters), untrained, mode), ids_BS)
    plain = Uniform(1 / 3) if mode != "top1" else Fixed([1.0, 0.0, 0.0])
    expected_BN, expected_BNV = said(Mixture(views_of(adapters), plain, mode), ids_BS)
    assert torch.equal(tokens_BN, expected_BN)
    torch.testing.assert_close(logits_BNV, expected_BNV, atol=1e-5, rtol=1e-5)


def routing_head(adapters: AxisAdapters, views: Views) -> MoCaE:
    """A head whose weights differ from prompt to prompt."""
    head = MoCaE(AXES, 32, 16)
    torch.manual_seed(3)
    head.projection = type(head.projection).of(torch.randn(20, 4, 32), 16, torch.Generator().manual_seed(0))
    head.W_r.data.normal_(0, 3.0)
    return head


@pytest.mark.parametrize("mode", ["weights", "hidden"])
@pytest.mark.parametrize("position", ["last", "mean"])
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(4)), padding=st.integers(0, 4))
def test_neither_order_nor_padding_matters(mode: Mode, position: str, order: list[int], padding: int) -> None:
    adapters = adapted()
    views = views_of(adapters, layer=1, position=position)
    mixture = Mixture(views, routing_head(adapters, views), mode)
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (4, 9, 6, 7)]
    alone = [said(mixture, torch.tensor([row])) for row in rows]
    alphas = [mixture.route(torch.tensor([row]))[0] for row in rows]
    assert max(float((alphas[0] - other).abs().max()) for other in alphas) > 0.05, "prompts are routed apart"
    ids_BS, mask_BS = left_pad([rows[i] for i in order], 0, torch.device("cpu"))
    extra = torch.zeros(4, padding, dtype=torch.long)
    ids_BS, mask_BS = torch.cat([extra, ids_BS], 1), torch.cat([extra, mask_BS], 1)
    tokens_BN, logits_BNV = said(mixture, ids_BS, mask_BS)
    for at, index in enumerate(order):
        torch.testing.assert_close(logits_BNV[at], alone[index][1][0], atol=2e-4, rtol=1e-4)
        assert torch.equal(tokens_BN[at], alone[index][0][0])


def test_every_sample_of_a_prompt_has_the_prompts_weights() -> None:
    adapters = adapted()
    views = views_of(adapters)
    for mode in ("weights", "hidden"):
        mixture = Mixture(views, routing_head(adapters, views), cast(Mode, mode))
        ids_BS = token_ids(2, 6)
        once_BN, _ = said(mixture, ids_BS)
        torch.manual_seed(0)
        found = mixture.generate(
            ids_BS, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=5, eos_token_id=None
        )
        assert torch.equal(found[:, 6:], once_BN.repeat_interleave(3, 0))


def test_beams_are_refused_where_they_would_be_wrong() -> None:
    mixture = Mixture(views_of(adapted()), Uniform(1 / 3), "hidden")
    with pytest.raises(UserError, match="num_beams: found 2; mode hidden allows 1"):
        mixture.generate(token_ids(), num_beams=2, max_new_tokens=2)


def test_afterwards_the_model_is_as_it_was_and_no_gradient_is_on() -> None:
    """Also after an error inside; PEFT's own switches would turn gradients on."""
    adapters, ids_BS = adapted(), token_ids()
    _, before_BNV = said(adapters.model, ids_BS)
    for mode in ("weights", "top1", "hidden"):
        mixture = Mixture(views_of(adapters), Uniform(1 / 3), cast(Mode, mode))
        said(mixture, ids_BS)
        with pytest.raises(ZeroDivisionError), mixture.mixed(torch.full((3, 3), 1 / 3)):
            _ = 1 / 0
    _, after_BNV = said(adapters.model, ids_BS)
    assert torch.equal(before_BNV, after_BNV)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    with Adapter(adapters, "honest").training():
        trained = [name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad]
        assert trained and all(".honest." in name for name in trained)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())


def test_features_are_the_base_and_each_adapter_at_the_last_prompt_token() -> None:
    adapters, ids_BS = adapted(), token_ids(2, 6)
    read_BVD = views_of(adapters, layer=1).read(ids_BS, torch.ones_like(ids_BS))
    for view, acting in enumerate([(), *((axis,) for axis in AXES)]):
        with adapters.acting(*acting), torch.no_grad():
            out = adapters.model(input_ids=ids_BS, output_hidden_states=True)
        torch.testing.assert_close(read_BVD[:, view], out.hidden_states[2][:, -1])
    with pytest.raises(UserError, match=r"features\.layer: found 3; the model has layers 0 to 2"):
        views_of(adapters, layer=3)
