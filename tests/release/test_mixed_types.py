"""A base whose files mix types, hold more than the model loads and are cut in an odd way: the export is its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.moe.families import FAMILIES, Family
from tests.release.bench import Bench, one_thread
from tests.tiny import tiny_tokenizer
from trainer.model.weight_files import CheckpointFiles, bits
from trainer.release.audit import AuditFailed, audit_files
from trainer.release.patch import apply_patch

__all__ = ["one_thread"]

OTHERS = {
    "LICENSE": b"terms",
    "NOTICE": b"notice",
    "tokenizer.model": b"\x00sp\xff",
    "merges.txt": b"#version\n",
    "preprocessor_config.json": b'{"patch_size": 16}',
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
    "modeling_own.py": b"raise SystemExit\n",
}


def mixed(family: Family, folder: Path, main: torch.dtype, other: torch.dtype, *, fused: bool = False) -> None:
    """In two files: routers, norms, biases, the last experts and half of attention in the other type."""
    family.build().save_pretrained(folder, save_original_format=not fused)
    tiny_tokenizer().save_pretrained(folder)
    for name, content in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".env").write_text("SECRET=1")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # The low bits of an fp32 tensor are not zero, as after a cast they would be.
    odd = ("gate.weight", "router", "norm", "bias", "experts.7.", "k_proj", "shared_expert.down", "A_log", "scale")
    tensors: dict[str, Tensor] = {
        name: tensor.to(other if any(part in name for part in odd) else main) for name, tensor in found.items()
    }
    tensors |= {"mtp.fc.weight": torch.randn(4, 4), "mtp.steps": torch.arange(3)}
    names = sorted(tensors, key=lambda name: name[::-1])  # a layer's tensors lie in either file
    files = {"a-of-2.safetensors": names[::2], "b-of-2.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, folder / file, {"format": "pt", "made": "elsewhere", "by": "hand"})
    index = {"metadata": {"by": "hand"}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(main).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=7))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_is_the_base(bench: Bench) -> set[str]:
    """The export is the base's folder, file by file and type by type; returns the tensors that differ."""
    base, exported = bench.base, bench.folder / "model"
    left = {".env", "pytorch_model.bin"}
    assert contents(exported).keys() == contents(base).keys() - left
    before, after = contents(base), contents(exported)
    assert {n for n in after if before[n] != after[n]} <= {"a-of-2.safetensors", "b-of-2.safetensors"}
    moved = set()
    with CheckpointFiles(base) as old, CheckpointFiles(exported) as new:
        assert old.file_of == new.file_of
        for name in old.file_of:
            a, b = old.tensor(name), new.tensor(name)
            assert a.dtype == b.dtype, name
            if not torch.equal(bits(a), bits(b)):
                moved.add(name)
    return moved


PAIRS = {
    "fp32 in bf16": (torch.bfloat16, torch.float32, "auto"),
    "bf16 in fp32": (torch.float32, torch.bfloat16, "auto"),
    "fp32 in bf16, run in fp32": (torch.bfloat16, torch.float32, torch.float32),
    "bf16 in fp32, run in bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_export_and_patch_are_the_bases_folder_in_every_family(family: Family, tmp_path: Path) -> None:
    for number, (main, other, run_in) in enumerate(PAIRS.values()):
        at = tmp_path / str(number)
        mixed(family, at / "base", main, other)
        bench = Bench.of(at / "base", dtype=run_in, shared=family.shared is not None)
        found = bench.export()
        assert (found["compared"], found["untouched_identical"], found["not_as_trained"]) == ("files", True, [])
        assert (found["experts_changed"], found["not_moved"], found["gate_weights_changed"]) == (3, [], 0.0)
        moved = check_is_the_base(bench)
        assert len(moved) == found["tensors_changed"] > 0
        apply_patch(str(at / "base"), bench.folder, at / "applied")
        assert contents(at / "applied") == contents(bench.folder / "model")


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"routers": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES[::4], ids=lambda family: family.model_type)
def test_a_lora_and_trained_routers_too(family: Family, options: dict[str, Any], tmp_path: Path) -> None:
    mixed(family, tmp_path / "base", torch.bfloat16, torch.float32)
    bench = Bench.of(tmp_path / "base", **options)
    found = bench.export(routers="routers" in options)
    assert (found["untouched_identical"], found["not_as_trained"], found["experts_changed"]) == (True, [], 3)
    assert (found["gate_weights_changed"] > 0.5) is ("routers" in options)
    check_is_the_base(bench)
    apply_patch(str(tmp_path / "base"), bench.folder, tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(bench.folder / "model")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_base_with_fused_names_keeps_them(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == name)
    mixed(family, tmp_path / "base", torch.bfloat16, torch.float32, fused=True)
    bench = Bench.of(tmp_path / "base")
    found = bench.export()
    assert (found["compared"], found["untouched_identical"], found["experts_changed"]) == ("files", True, 3)
    moved = check_is_the_base(bench)
    assert moved and all("experts" in name for name in moved)
    apply_patch(str(tmp_path / "base"), bench.folder, tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(bench.folder / "model")


def older_names(folder: Path, experts: torch.dtype | None) -> None:
    """The base as files of before `model.` began every name; experts all of one type where one is given."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        held = load_file(folder / file)
        save_file(
            {
                name.removeprefix("model."): tensor.to(experts) if experts and ".experts." in name else tensor
                for name, tensor in held.items()
            },
            folder / file,
        )
    index["weight_map"] = {name.removeprefix("model."): file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_a_base_of_older_names_is_written_anew_in_the_types_and_bits_of_its_tensors(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == name)
    mixed(family, tmp_path / "base", torch.bfloat16, torch.float32)
    older_names(tmp_path / "base", torch.bfloat16)
    bench = Bench.of(tmp_path / "base")
    found = bench.export()
    assert (found["compared"], found["untouched_identical"], found["experts_changed"]) == ("models", True, 3)
    wide = set()
    with CheckpointFiles(tmp_path / "base") as old, CheckpointFiles(bench.folder / "model") as new:
        for own in new.file_of:
            before, after = old.tensor(own.removeprefix("model.")), new.tensor(own)
            assert before.dtype == after.dtype, own
            if ".experts." not in own:
                assert torch.equal(bits(before), bits(after)), own
                wide |= {own} if before.dtype == torch.float32 else set()
    assert any("norm" in own for own in wide) and any("gate" in own for own in wide)


def test_a_type_that_another_format_cannot_keep_is_refused_by_name(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == "qwen3_moe")
    mixed(family, tmp_path / "base", torch.bfloat16, torch.float32)
    older_names(tmp_path / "base", None)
    with pytest.raises(AuditFailed, match=r"layers\.0\.mlp\.experts\.7\.down_proj\.weight"):
        Bench.of(tmp_path / "base").export()


def test_an_export_in_another_format_with_a_tensor_cast_is_refused(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.model_type == "qwen3_moe")
    mixed(family, tmp_path / "base", torch.bfloat16, torch.float32)
    older_names(tmp_path / "base", torch.bfloat16)
    bench = Bench.of(tmp_path / "base")
    bench.export(patch=False)
    file = bench.folder / "model" / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"] = held["model.norm.weight"].bfloat16()
    save_file(held, file, {"format": "pt"})
    found = audit_files(tmp_path / "base", bench.folder / "model", bench.footprint())
    assert found["untouched_identical"] is False and "model.norm.weight" in found["moved_outside"]
