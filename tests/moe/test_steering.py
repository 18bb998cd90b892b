"""Steering: the named experts run or do not run, on every token, in every family; strength 0 is nothing at all."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.moe.families import FAMILIES as ALL_FAMILIES
from tests.moe.families import Family
from tests.tiny import FAMILIES, tiny_model, token_ids
from trainer.moe.backbone import Backbone
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.routing import Trace, record
from trainer.moe.steering import Steering, applied, steer
from trainer.moe.steering_file import SteeringFile, read
from trainer.moe.steering_gate import Gate, last_hidden

STEERING = Steering({0: (3,), 2: (1, 5)}, {0: (0, 6), 1: (2,)})
BY_TYPE = {family.model_type: family for family in ALL_FAMILIES}


def steered(backbone: Backbone, steering: Steering, ids: torch.Tensor, **kwargs: object) -> dict[int, torch.Tensor]:
    with torch.no_grad(), steer(backbone, steering), applied(backbone) as ran:
        backbone.model(ids, **kwargs)
    return {index: indices[-1] for index, indices in ran.items()}


def own(backbone: Backbone, ids: torch.Tensor) -> Trace:
    with torch.no_grad(), record(backbone) as trace:
        backbone.model(ids)
    return trace


def has(index_TK: torch.Tensor, expert: int) -> torch.Tensor:
    return (index_TK == expert).any(-1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ALL_FAMILIES]
    + [(BY_TYPE[name], torch.bfloat16) for name in ("olmoe", "phimoe", "gpt_oss", "deepseek_v3")],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_every_activated_expert_runs_on_every_token_and_no_deactivated_one_on_any(
    family: Family, dtype: torch.dtype
) -> None:
    backbone = Backbone.of(family.build().to(dtype)).check()
    ids = token_ids(6, 12) % 60 + 2
    before = own(backbone, ids)
    layers = [layer.index for layer in backbone]
    # Experts that both occur and are left out before, so that each is forced to be otherwise for some token.
    mixed = {i: [e for e in range(8) if 0 < has(before.index_TK[i], e).sum() < ids.numel()] for i in layers}
    steering = Steering({i: (mixed[i][0],) for i in layers}, {i: tuple(mixed[i][1:3]) for i in layers})
    after = steered(backbone, steering, ids)
    assert any(steering.deactivate.values())
    for index in layers:
        for expert in steering.activate[index]:
            assert has(after[index], expert).all() and not has(before.index_TK[index], expert).all()
        for expert in steering.deactivate[index]:
            assert not has(after[index], expert).any() and has(before.index_TK[index], expert).any()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_weights_and_choice_follow_the_papers_formula(family: str) -> None:
    """By hand, in the paper's own words: log_softmax, forced scores, softmax, top-k, the model's renormalisation."""
    backbone = Backbone.of(BY_TYPE[family].build()).check()
    layer = backbone.layer(0)
    called: dict[str, torch.Tensor] = {}

    def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        _, called["index"], called["weights"] = (*args, *kwargs.values())

    handle = layer.experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), steer(backbone, Steering({0: (3,)}, {0: (0, 6)})), record(backbone) as trace:
        backbone.model(token_ids())
    handle.remove()
    scores = trace.logits_TE[0].log_softmax(-1)
    highest, lowest = scores.max(-1).values, scores.min(-1).values
    scores[:, 3], scores[:, 0], scores[:, 6] = highest + 0.01, lowest - 0.01, lowest - 0.01
    probabilities, index = scores.softmax(-1).topk(2)
    if family != "olmoe":  # olmoe does not renormalise over the chosen
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    assert torch.equal(called["index"], index)
    torch.testing.assert_close(called["weights"], probabilities, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["phimoe", "deepseek_v3", "minimax_m2", "lfm2_moe", "ernie4_5_moe"])
def test_other_routers_keep_their_weights_for_the_forced_choice(family: str) -> None:
    """Selection only: a layer whose forced experts were chosen anyway keeps indices and weights as they were."""
    backbone = Backbone.of(BY_TYPE[family].build()).check()
    ids = token_ids(1, 8) % 60 + 2
    before = own(backbone, ids)
    index = backbone.layers[0].index
    chosen = before.index_TK[index]
    with torch.no_grad(), steer(backbone, Steering({index: (int(chosen[3, 0]),)})):
        seen: dict[str, tuple[torch.Tensor, ...]] = {}
        layer = backbone.layer(index)
        handle = layer.router.register_forward_hook(lambda _m, _a, output: seen.__setitem__("output", output))
        backbone.model(ids)
        handle.remove()
    _, weights, after = seen["output"]
    order, own_order = after[3].argsort(), chosen[3].argsort()
    assert torch.equal(after[3][order], chosen[3][own_order])
    torch.testing.assert_close(weights[3][order], before.weights_TK[index][3][own_order], atol=1e-6, rtol=1e-5)
    assert layer.scoring is not None
    torch.testing.assert_close(
        weights, layer.scoring.weights(before.logits_TE[index], after.long()), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "lfm2_moe", "ernie4_5_moe"])
def test_a_barred_experts_place_goes_to_the_next_by_selection_score_not_by_logit(family: str) -> None:
    """Where the router adds a bias for choosing; without groups in the way the rule is known to the last expert."""
    options = {**BY_TYPE[family].options, **({"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {})}
    backbone = Backbone.of(replace(BY_TYPE[family], options=options).build()).check()
    ids = token_ids(4, 12) % 60 + 2
    layer = backbone.layers[0]
    before = own(backbone, ids)
    barred = int(before.index_TK[layer.index].flatten().mode().values)
    bias = next(
        t
        for name, t in (*backbone.model.named_parameters(), *backbone.model.named_buffers())
        if name.endswith(("e_score_correction_bias", "expert_bias")) and f".{layer.index}." in f".{name}"
    ).flatten()
    logits = before.logits_TE[layer.index].float()
    scores = (logits.softmax(-1) if family == "ernie4_5_moe" else logits.sigmoid()) + bias
    scores[:, barred] = -torch.inf
    after = steered(backbone, Steering(deactivate={layer.index: (barred,)}), ids)[layer.index]
    assert torch.equal(after.sort(-1).values, scores.topk(2).indices.sort(-1).values)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_strength_0_changes_no_bit_and_attaches_nothing(family: str) -> None:
    backbone = Backbone.of(BY_TYPE[family].build()).check()
    ids = token_ids() % 60 + 2
    index = backbone.layers[0].index
    with torch.no_grad():
        expected = backbone.model(ids).logits
        with steer(backbone, Steering({index: (3,)}, {index: (0,)}, strength=0.0)):
            assert not any(layer.router._forward_hooks for layer in backbone)
            assert torch.equal(backbone.model(ids).logits, expected)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_with_growing_strength_an_expert_only_gains_or_only_loses_tokens(family: str, seed: int) -> None:
    backbone = Backbone.of(BY_TYPE[family].build()).check()
    ids = token_ids(3, 8, seed) % 60 + 2
    index = backbone.layers[0].index
    on, off = [], []
    for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        ran = steered(backbone, Steering({index: (3,)}, {index: (0,)}, strength), ids)[index]
        on.append(has(ran, 3))
        off.append(has(ran, 0))
    for weak, strong in itertools.pairwise(on):
        assert (strong | ~weak).all()
    for weak, strong in itertools.pairwise(off):
        assert (weak | ~strong).all()
    assert on[-1].all() and not off[-1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_steered_at_prefill_and_at_every_step_with_cache_and_left_padding(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    backbone = Backbone.of(model).check()
    ids = token_ids(3, 6)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    with steer(backbone, STEERING), applied(backbone) as ran:
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    for index, passes in ran.items():
        assert [len(t) for t in passes] == [18, 3, 3, 3]
        for index_TK in passes:
            assert all(has(index_TK, e).all() for e in STEERING.activate.get(index, ()))
            assert not any(has(index_TK, e).any() for e in STEERING.deactivate.get(index, ()))


def test_a_batch_is_steered_as_its_rows_alone() -> None:
    model = tiny_model("qwen3_moe")
    backbone = Backbone.of(model).check()
    long, short = token_ids(1, 8, 2), token_ids(1, 5, 3)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    with steer(backbone, STEERING):
        both = model.generate(torch.cat([long, padded]), attention_mask=mask, **options)
        alone = [model.generate(row, attention_mask=torch.ones_like(row), **options) for row in (long, short)]
    assert torch.equal(both[0], alone[0][0]) and torch.equal(both[1, 3:], alone[1][0])


def test_hooks_are_gone_afterwards_and_the_model_is_itself_again() -> None:
    backbone = Backbone.of(tiny_model()).check()
    with torch.no_grad():
        expected = backbone.model(token_ids()).logits
        with pytest.raises(RuntimeError, match="inside"), steer(backbone, STEERING, gate_that(True, backbone)):
            assert not torch.equal(backbone.model(token_ids()).logits, expected)
            raise RuntimeError("inside")
        assert torch.equal(backbone.model(token_ids()).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


# --- the gate -------------------------------------------------------------------------------------


def gate_that(fires: bool, backbone: Backbone) -> Gate:
    return Gate(0, (0.0,) * backbone.model.config.hidden_size, 1.0 if fires else -1.0, {})


def gate_between(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Gate, torch.Tensor]:
    """A gate that fires on about half of these prompts, and on which."""
    hidden = last_hidden(backbone, [1], {"input_ids": ids, "attention_mask": mask}, mask)[1]
    values = hidden[:, 0]
    gate = Gate(1, (1.0,) + (0.0,) * (hidden.shape[1] - 1), -float(values.median()), {})
    fired = gate.fires(hidden)
    assert 0 < fired.sum() < len(fired)
    return gate, fired


def test_the_gate_steers_the_rows_it_fires_on_and_leaves_the_others_alone() -> None:
    backbone = Backbone.of(tiny_model()).check()
    ids = token_ids(5, 7)
    gate, fired = gate_between(backbone, ids, torch.ones_like(ids))

    def run(steering: Steering, gate: Gate | None) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), steer(backbone, steering, gate), applied(backbone) as ran:
            logits = backbone.model(ids).logits
        return logits, torch.stack([ran[i][-1].view(5, 7, 2) for i in range(3)], 1)

    (plain, own_routing), (full, steered_routing) = run(replace(STEERING, strength=0.0), None), run(STEERING, None)
    gated, routing = run(STEERING, gate)
    for row, fires in enumerate(fired.tolist()):
        assert torch.equal(routing[row], (steered_routing if fires else own_routing)[row])
        torch.testing.assert_close(gated[row], (full if fires else plain)[row], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(full[row], plain[row], atol=1e-3)


def test_the_gates_verdict_of_prefill_holds_while_tokens_are_generated() -> None:
    model = tiny_model("qwen3_moe")
    backbone = Backbone.of(model).check()
    ids = token_ids(4, 6)
    mask = torch.ones_like(ids)
    ids[2, :2] = mask[2, :2] = 0
    gate, fired = gate_between(backbone, ids, mask)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    plain = model.generate(ids, **options)
    with steer(backbone, STEERING):
        full = model.generate(ids, **options)
    with steer(backbone, STEERING, gate), applied(backbone) as ran:
        gated = model.generate(ids, **options)
    assert torch.equal(gated, torch.where(fired[:, None], full, plain))
    for index_TK in ran[0][2:]:  # the gate's own pass over the prompt, prefill, then one token a pass
        assert has(index_TK, 3)[fired].all() and not has(index_TK, 3)[~fired].all()


def test_the_last_prompt_token_is_found_with_padding_on_either_side() -> None:
    backbone = Backbone.of(tiny_model()).check()
    ids = token_ids(1, 5)
    expected = last_hidden(backbone, [1], {"input_ids": ids}, None)[1]
    for pad in ((3, 0), (0, 3)):
        padded = nn.functional.pad(ids, pad)
        mask = nn.functional.pad(torch.ones_like(ids), pad)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
        torch.testing.assert_close(last_hidden(backbone, [1], inputs, mask)[1], expected, atol=1e-5, rtol=1e-4)


def test_a_gate_of_another_hidden_size_is_refused() -> None:
    backbone = Backbone.of(tiny_model()).check()
    gate = Gate(0, (1.0, 0.0, 0.0), 0.0, {})
    with (
        pytest.raises(ValueError, match="fitted on hidden states of size 3, the model's are 32"),
        steer(backbone, STEERING, gate),
    ):
        backbone.model(token_ids())


# --- what cannot be steered -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steering({0: (9,)}), "expert 9 of layer 0 does not exist: 0..7"),
        (lambda: Steering({7: (1,)}), r"layer 7 has no experts; MoE layers: \[0, 1, 2\]"),
        (lambda: Steering({0: (1, 2, 3)}), "layer 0 activates 3 experts, its router chooses only 2"),
        (lambda: Steering({}, {1: tuple(range(7))}), "layer 1 deactivates 7 of 8 experts; at most 6"),
        (lambda: Steering({0: (1,)}, {0: (1,)}), "expert 1 of layer 0 is in both activate and deactivate"),
        (lambda: Steering({0: (1, 1)}), "layer 0 names an expert twice in activate"),
        (lambda: Steering({0: (1,)}, strength=1.5), "strength 1.5 is outside 0"),
        (lambda: Steering({0: (1,)}, eps=0.0), "eps 0.0 must be above 0"),
    ],
)
def test_impossible_steering_is_refused_in_one_line(make: object, message: str) -> None:
    backbone = Backbone.of(tiny_model()).check()
    with pytest.raises(ValueError, match=message) as refused, steer(backbone, make()):  # type: ignore[operator]
        pass
    assert "\n" not in str(refused.value)


def test_as_many_experts_as_can_be_spared_may_be_deactivated() -> None:
    backbone = Backbone.of(tiny_model()).check()
    ran = steered(backbone, Steering({}, {1: tuple(range(6))}), token_ids())
    assert (ran[1].sort(-1).values == torch.tensor([6, 7])).all()


def test_a_router_of_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scoring family of model\.layers\.0\.mlp\.gate is unknown"):
        steer(Backbone.of(tiny_model()), STEERING).__enter__()


# --- steering.json --------------------------------------------------------------------------------


def test_a_steering_file_comes_back_equal(tmp_path: Path) -> None:
    backbone = Backbone.of(tiny_model()).check()
    gate = Gate(1, tuple(0.1 * i for i in range(32)), -0.25, {"harmful": 3})
    file = SteeringFile.of(
        backbone, STEERING, model="me/it", revision="abc", per_layer_cap=1, gate=gate, about={"n_pos": 3}
    )
    path = tmp_path / "steering.json"
    path.write_text(file.to_json())
    assert SteeringFile.load(path) == file
    assert read(path, backbone, "it") == file
    assert {"model", "revision", "model_type", "per_layer_cap", "strength"} <= json.loads(path.read_text()).keys()


def test_a_model_loaded_in_another_precision_is_still_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "steering.json"
    path.write_text(SteeringFile.of(Backbone.of(tiny_model()).check(), STEERING, model="m").to_json())
    assert read(path, Backbone.of(tiny_model(dtype=torch.bfloat16)).check(), "m").steering == STEERING


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_model("qwen3_moe"), "of model type 'olmoe'; other is of type 'qwen3_moe'"),
        (tiny_model("olmoe", seed=5), "the routers of other have other weights"),
    ],
    ids=["architecture", "weights"],
)
def test_a_steering_of_another_model_is_refused(model: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "steering.json"
    path.write_text(SteeringFile.of(Backbone.of(tiny_model()).check(), STEERING, model="mine").to_json())
    with pytest.raises(ValueError, match=message):
        read(path, Backbone.of(model).check(), "other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, 'format: found "x", expected'),
        ({"activate": [[0, 3]], "deactivate": [[0, 3]]}, "in both activate and deactivate"),
        ({"activate": [[0, 99]]}, "expert 99 of layer 0 does not exist"),
        ({"activate": [[0]]}, "not a usable steering file"),
        ({"deactivate": [[0, e] for e in range(1, 8)], "activate": []}, "deactivates 7 of 8"),
        ({"eps": None}, "not a usable steering file"),
    ],
)
def test_a_damaged_steering_file_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "steering.json"
    whole = json.loads(SteeringFile.of(Backbone.of(tiny_model()).check(), STEERING, model="m").to_json())
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ValueError, match=message) as refused:
        SteeringFile.load(path)
    assert str(path) in str(refused.value)
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "top_k"}))
    with pytest.raises(ValueError, match="top_k: the key is missing"):
        SteeringFile.load(path)


def test_an_expert_set_is_deactivated(tmp_path: Path) -> None:
    backbone = Backbone.of(tiny_model()).check()
    path = tmp_path / "set.json"
    path.write_text(ExpertSet((Member(0, 3), Member(2, 1)), {0: 8, 1: 8, 2: 8}).to_json())
    assert read(path, backbone, "m").steering == Steering({}, {0: (3,), 2: (1,)})
    path.write_text(ExpertSet((Member(0, 3),), {0: 8}).to_json())
    with pytest.raises(ValueError, match="an expert set of another model"):
        read(path, backbone, "m")


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steering_as_in_the_papers_table_costs_at_most_5_percent_of_generation() -> None:
    from tests.moe.steering_overhead import overhead

    assert overhead(16, 256, 64, 8, 4, 5) <= 1.05
