"""Finding and checking the MoE layers of a model."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.moe import families
from tests.tiny import FAMILIES, NUM_EXPERTS, NUM_LAYERS, TOP_K, tiny_model
from trainer.moe.backbone import Backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_with_its_sizes(family: str) -> None:
    backbone = Backbone.of(tiny_model(family)).check()
    assert [layer.index for layer in backbone] == list(range(NUM_LAYERS))
    assert {(layer.num_experts, layer.top_k) for layer in backbone} == {(NUM_EXPERTS, TOP_K)}
    assert backbone.total_experts == NUM_LAYERS * NUM_EXPERTS


@pytest.mark.parametrize(
    ("family", "scoring"),
    [
        ("olmoe", "softmax over all experts"),
        ("qwen3_moe", "softmax over chosen experts"),
        ("gpt_oss", "softmax over chosen experts"),
    ],
)
def test_the_scoring_family_is_identified_from_the_router_output(family: str, scoring: str) -> None:
    assert {layer.scoring.family for layer in Backbone.of(tiny_model(family)).check()} == {scoring}


def test_a_dense_model_is_refused_and_says_so() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match="'llama' is dense: no router and no experts module found"):
        Backbone.of(LlamaForCausalLM(config))


def test_experts_without_a_router_are_refused() -> None:
    model = tiny_model()
    block = model.model.layers[1].mlp
    gate = block.gate
    del block.gate
    block.other = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"no router beside the experts module 'model.layers.1.mlp.experts'.*other"):
        Backbone.of(model)
    block.gate = gate
    assert len(Backbone.of(model)) == NUM_LAYERS


def test_a_router_that_breaks_the_contract_is_refused() -> None:
    model = tiny_model()
    gate = model.model.layers[2].mlp.gate
    original = type(gate).forward
    gate.forward = lambda hidden: (original(gate, hidden)[0][:, :-1], *original(gate, hidden)[1:])
    with pytest.raises(ValueError, match=r"layer 2 .*router output shapes"):
        Backbone.of(model).check()


def test_a_router_that_returns_probabilities_is_refused() -> None:
    """transformers before 5.6 did; every loss on logits would be wrong without a word."""
    model = tiny_model()
    gate = model.model.layers[1].mlp.gate
    original = type(gate).forward
    gate.forward = lambda hidden: (original(gate, hidden)[0].softmax(-1), *original(gate, hidden)[1:])
    with pytest.raises(ValueError, match=r"layer 1 .*router returned probabilities where OlmoeTopKRouter"):
        Backbone.of(model).check()


def test_selection_biases_are_no_trainable_part_of_a_router() -> None:
    family = next(family for family in families.FAMILIES if family.model_type == "ernie4_5_moe")
    backbone = Backbone.of(family.build())
    assert any(n.endswith("e_score_correction_bias") for n, _ in backbone.layers[0].router.named_parameters())
    assert {name.rpartition(".")[2] for name in backbone.router_parameters()} == {"weight"}


def test_random_probes_avoid_the_placeholders_at_the_end_of_a_vocabulary() -> None:
    model = tiny_model()
    model.resize_token_embeddings(5000)
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    Backbone.of(model).check()
    assert seen[0].max() < 1000


def test_experts_called_with_other_indices_are_refused() -> None:
    model = tiny_model()
    experts = model.model.layers[0].mlp.experts
    original = experts.forward
    handle = experts.register_forward_pre_hook(lambda _m, args: (args[0], (args[1] + 1) % NUM_EXPERTS, args[2]))
    with pytest.raises(ValueError, match="not called with the router's own indices"):
        Backbone.of(model).check()
    handle.remove()
    assert original is not None


def test_an_unknown_scoring_family_is_left_open_not_guessed() -> None:
    model = tiny_model()
    gate = model.model.layers[0].mlp.gate
    original = type(gate).forward

    def strange(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, index = original(gate, hidden)
        return logits, weights**2 + 0.1, index

    gate.forward = strange
    backbone = Backbone.of(model).check()
    assert backbone.layers[0].scoring is None
    assert backbone.layers[1].scoring is not None


def test_check_leaves_no_hook_and_the_training_mode_behind() -> None:
    model = tiny_model().train()
    Backbone.of(model).check()
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_that_are_not_finite_are_called_that() -> None:
    model = tiny_model()
    model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(
        ValueError, match=r"the model's logits are NaN or infinite on 16 random tokens, in torch.float32"
    ):
        Backbone.of(model).check()
