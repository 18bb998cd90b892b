"""The cost of answering: a mixture of whole MLPs computes what its base computes, and ratios show what it costs."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.errors import UserError
from tests.tiny import FAMILIES, tiny_model, token_ids
from trainer.methods.alignx.cost import Prompts, held_bytes, measure_cost, mlp_mixture


def dense(hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_three_equal_mlps_compute_what_the_base_computes(family: str) -> None:
    model = dense() if family == "llama" else tiny_model(family)
    mixture = mlp_mixture(model)
    ids = token_ids()
    with torch.no_grad():
        assert torch.allclose(mixture(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    layers = model.get_decoder().layers
    mlps = sum(parameter.numel() for layer in layers for parameter in layer.mlp.parameters())
    gates = len(layers) * 3 * model.config.hidden_size
    assert held_bytes(mixture) == held_bytes(model) + 4 * (2 * mlps + gates)


def test_the_gate_weighs_the_copies_token_by_token() -> None:
    model = dense()
    mixture = mlp_mixture(model)
    first = mixture.get_decoder().layers[0].mlp
    with torch.no_grad():
        first.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
        for parameter in first.copies[1].parameters():
            parameter.mul_(2)
        hidden_BSH = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
        weight_BSC = first.gate(hidden_BSH).softmax(-1)
        one, two, three = (mlp(hidden_BSH) for mlp in first.copies)
        expected = weight_BSC[..., :1] * one + weight_BSC[..., 1:2] * two + weight_BSC[..., 2:] * three
        assert torch.allclose(first(hidden_BSH), expected, atol=1e-6)
    assert not torch.allclose(one, two)


def test_a_layer_without_a_known_mlp_is_refused() -> None:
    model = dense()
    layer = model.get_decoder().layers[1]
    layer.perceptron = layer.mlp
    del layer.mlp
    with pytest.raises(UserError, match=r"layer 1: found .*perceptron; a mixture of MLPs needs one of mlp"):
        mlp_mixture(model)


def test_bytes_that_are_shared_count_once() -> None:
    linear = nn.Linear(4, 4, bias=False)
    assert held_bytes(nn.ModuleList([linear, linear])) == held_bytes(linear) == 64
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = nn.Parameter(linear.weight.data.view(4, 4))
    assert held_bytes(nn.ModuleList([linear, tied])) == 64


class Grows(nn.Module):
    """Holds a tensor and, when it generates, so many bytes more."""

    def __init__(self, held: int, grows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(held, dtype=torch.uint8), requires_grad=False)
        self.grows, self.tokens = grows, list[int]()

    def generate(self, *, input_ids: torch.Tensor, min_new_tokens: int, max_new_tokens: int, **_: object) -> None:
        assert min_new_tokens == max_new_tokens
        self.tokens.append(max_new_tokens)
        torch.ones(self.grows, dtype=torch.uint8)


MIB = 2**20


def test_peak_memory_is_what_a_way_holds_and_what_its_generation_adds() -> None:
    ids = token_ids()
    # Blocks of more than 32 MiB are mapped and unmapped one by one; smaller ones may reuse what others left.
    ways: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: Grows(80 * MIB, 80 * MIB),
        "small": lambda: Grows(80 * MIB, 40 * MIB),
        "large": lambda: Grows(400 * MIB, 240 * MIB),
    }
    found = measure_cost(ways, Prompts(ids, torch.ones_like(ids), 3), 2)
    assert list(found) == ["base", "small", "large"]
    assert found["large"]["parameters"] == 5 and found["base"]["latency"] == found["base"]["peak"] == 1
    if found["base"]["peak_bytes"] is None:
        pytest.skip("resident memory is read on Linux alone")
    assert found["large"]["peak"] == pytest.approx(4, abs=0.3)
    assert found["small"]["peak"] == pytest.approx(0.75, abs=0.1)


def test_a_mixture_of_mlps_costs_more_time_and_memory_than_its_base() -> None:
    base = dense(hidden=256, layers=4)
    mixture = mlp_mixture(base)
    ids = token_ids(rows=4, length=12)
    found = measure_cost({"base": lambda: base, "mlps": lambda: mixture}, Prompts(ids, torch.ones_like(ids), 8), 3)
    assert found["mlps"]["latency"] > 1.3
    assert found["mlps"]["parameters"] > 2
    assert set(found["base"]) == {"seconds", "parameter_bytes", "peak_bytes", "latency", "parameters", "peak"}
