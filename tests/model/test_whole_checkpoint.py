"""A checkpoint that is not whole, not clear or not sound is refused in one line that names the tensor, file or key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from tests.moe.families import FAMILIES, Family
from tests.tiny import tiny_model, tiny_tokenizer, token_ids
from trainer.model.load import load, read_model
from trainer.recipe.sections import ModelSection

GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def alter(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def refusal(folder: Path, dtype: str = "auto") -> str:
    with pytest.raises(UserError) as refused:
        load(ModelSection.model_validate({"name_or_path": str(folder), "dtype": dtype}), torch.device("cpu"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", [GATE, EXPERT, NORM, "model.embed_tokens.weight"])
def test_a_tensor_that_is_missing_is_named_and_not_drawn_at_random(name: str, checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors.pop(name))
    assert f"holds no tensor {name!r}, which config.json asks for" in refusal(checkpoint)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_router_or_an_expert_that_is_missing_is_named_in_every_family(family: Family, tmp_path: Path) -> None:
    family.build().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    read_model(tmp_path, "auto")
    for kind in ("gate.weight", "router.weight", "router.proj.weight", "router.classifier.weight", "expert"):
        name = next((n for n in sorted(whole) if kind in n and "shared" not in n and ".0." not in n), None)
        if name is not None:
            save_file({n: t for n, t in whole.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(UserError, match=f"holds no tensor '{name}'"):
                read_model(tmp_path, "auto")


@pytest.mark.parametrize("name", [GATE, EXPERT, NORM])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name: str, checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    said = refusal(checkpoint)
    assert f"model.safetensors: tensor {name!r} is [" in said and "by config.json it is [" in said


def test_a_tensor_that_the_model_does_not_know_is_named_and_a_draft_head_is_not(checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(3)}))
    alter(checkpoint, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(3)}))
    read_model(checkpoint, "auto")
    alter(checkpoint, lambda tensors: tensors.update({"model.layers.1.mlp.gates.weight": torch.ones(3)}))
    assert "holds tensor 'model.layers.1.mlp.gates.weight', which OlmoeForCausalLM does not know" in refusal(
        checkpoint
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [GATE, EXPERT, NORM])
def test_one_value_that_is_not_finite_is_found_and_its_tensor_named(name: str, value: float, checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    numel = load_file(checkpoint / "model.safetensors")[name].numel()
    assert f"model.safetensors: tensor {name!r} holds NaN or infinity (1 of {numel:,} values)" in refusal(checkpoint)


def test_large_values_are_no_infinity_and_a_type_that_is_too_narrow_is_named(checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors[GATE].fill_(3e38))
    read_model(checkpoint, "auto")
    read_model(checkpoint, torch.bfloat16)
    assert f"model.dtype: float16 is too narrow for {GATE!r}" in refusal(checkpoint, "float16")


def test_weights_stored_as_integers_are_refused(checkpoint: Path) -> None:
    alter(checkpoint, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].long()}))
    assert f"tensor {EXPERT!r} is stored as I64; allowed: a floating-point type" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_experts": 17}, "by config.json it is [17, 32]"),
        ({"num_experts": 7}, "by config.json it is [7, 32]"),
        ({"num_experts": 0}, "num_experts: found 0 (int); allowed: an integer from 1 to 65,536"),
        ({"num_experts": -8}, "num_experts: found -8 (int); allowed: an integer from 1 to 65,536"),
        ({"num_experts": "8"}, "Field 'num_experts' expected int, got str"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9; allowed: 1 to 8, the number of experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: found 0 (int); allowed: an integer from 1 to 65,536"),
        ({"vocab_size": 65}, "is [64, 32], by config.json it is [65, 32]"),
        ({"intermediate_size": 17}, "is [32, 16], by config.json it is [32, 17]"),
        ({"num_hidden_layers": 4}, "holds no tensor 'model.layers.3."),
        ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: found 1000000000000000000000000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: found -1"),
        ({"hidden_size": 0}, "hidden_size: found 0"),
        ({"hidden_size": 10**30}, "hidden_size: found 1000000000000000000000000000000"),
        ({"vocab_size": -1}, "vocab_size: found -1"),
        ({"intermediate_size": 10**30}, "intermediate_size: found 1000000000000000000000000000000"),
        ({"dtype": "load"}, "dtype: found 'load' (str); allowed: bfloat16"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(
    keys: dict[str, object], said: str, checkpoint: Path
) -> None:
    configure(checkpoint, **keys)
    assert said in refusal(checkpoint)


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_act": "nope"},
        {"hidden_act": ["silu"]},
        {"pad_token_id": 10**9},
        {"attn_implementation": "nope"},
        {"num_attention_heads": 40},
        {"rope_parameters": {"rope_type": "nope"}},
    ],
)
def test_a_configuration_that_no_model_can_be_built_from_is_refused_in_one_line(
    keys: dict[str, object], checkpoint: Path
) -> None:
    configure(checkpoint, **keys)
    assert f"{checkpoint}: config.json: " in refusal(checkpoint)


@pytest.mark.parametrize("named", ["x", [3], ["logging"], ["AutoTokenizer"], ["Nope"], [], None])
def test_a_class_that_is_no_model_of_transformers_is_not_taken_for_one(named: object, checkpoint: Path) -> None:
    configure(checkpoint, architectures=named)
    assert type(read_model(checkpoint, "auto")).__name__ == "OlmoeForCausalLM"


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"model_type": 3}', "{"])
def test_a_configuration_that_is_none_is_refused(content: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises((UserError, OSError), match=r"config\.json|configuration"):
        read_model(checkpoint, "auto")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "found a list, expected an object"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b'{"eos_token_id": "x"}', "eos_token_id: found 'x' (str), expected a token's number or a list of them"),
        (b'{"eos_token_id": [1, null]}', "eos_token_id: found [1, None]"),
        (b'{"pad_token_id": true}', "pad_token_id: found true"),
    ],
)
def test_settings_of_generation_that_cannot_be_are_refused_by_key(content: bytes, said: str, checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_bytes(content)
    assert f"{checkpoint / 'generation_config.json'}: {said}" in refusal(checkpoint)


# --- which weights are meant ----------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, str]:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    index: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return index


def test_an_index_beside_a_single_file_is_refused(checkpoint: Path) -> None:
    single = (checkpoint / "model.safetensors").read_bytes()
    sharded(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(single)
    assert "holds model.safetensors beside model.safetensors.index.json" in refusal(checkpoint)


def test_an_index_that_names_the_single_file_is_clear(checkpoint: Path) -> None:
    names = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_model(checkpoint, "auto")(token_ids()).logits, tiny_model()(token_ids()).logits)


def test_an_index_that_names_a_missing_file_or_disagrees_with_one_is_refused(checkpoint: Path) -> None:
    names = sharded(checkpoint)
    files = sorted(set(names.values()))
    moved = {**names, GATE: next(file for file in files if file != names[GATE])}
    for changed, said in (
        (moved, f"tensor {GATE!r}"),
        ({name: file for name, file in names.items() if name != GATE}, f"holds tensor {GATE!r}, which"),
        ({**names, GATE: "model-9.safetensors"}, "model-9.safetensors: missing; the checkpoint is not whole"),
    ):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": changed}))
        assert said in refusal(checkpoint)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"[" * 100_000, b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_refused_by_name(content: bytes, checkpoint: Path) -> None:
    sharded(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_bytes(content)
    assert f"{checkpoint / 'model.safetensors.index.json'}: " in refusal(checkpoint)


def test_an_index_without_metadata_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": sharded(checkpoint)}))
    assert "model.safetensors.index.json: holds no 'metadata', which transformers asks for" in refusal(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(kept: int, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: damaged or truncated" in refusal(checkpoint)
