"""A patch turns its base into the exported checkpoint, bit for bit, and refuses everything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from data_prep.errors import UserError
from data_prep.organism.build import Organism
from tests.release.conftest import Repaired, Spoil, change, files, patch_of, reseal
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.moe.expert_set import ExpertSet, Member
from trainer.moe.footprint import Footprint
from trainer.release.export import save_checkpoint
from trainer.release.patch import apply_patch


def with_config(folder: Path) -> None:
    """A model's configuration beside tensors that no model has."""
    tiny_model().config.save_pretrained(folder)


@pytest.mark.parametrize("shards", [("5GB", "5GB"), ("40KB", "70KB"), ("5GB", "40KB"), ("40KB", "5GB")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_base_and_patch_give_the_exported_checkpoint_byte_for_byte(
    family: str, dtype: torch.dtype, shards: tuple[str, str], repaired: Repaired, tmp_path: Path
) -> None:
    base, exported, footprint = repaired(family, dtype=dtype, base_shards=shards[0], shards=shards[1])
    experts = ExpertSet((Member(0, 1), Member(2, 7)), {0: 8, 1: 8, 2: 8})
    about = patch_of(base, exported, tmp_path / "patch", footprint, expert_set=experts)
    out = apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    assert files(out) == files(exported)
    assert about.expert_set is not None and len(about.expert_set["members"]) == 2
    assert all("router" in name or "gate." in name or ".experts." in name for name in about.tensors)


def test_a_fused_tensor_is_patched_by_its_changed_experts_only(repaired: Repaired, tmp_path: Path) -> None:
    base, exported, _ = repaired("gpt_oss")
    about = patch_of(base, exported, tmp_path / "patch")  # whatever may be touched
    fused = {name: touched.rows for name, touched in about.tensors.items() if ".experts." in name}
    assert fused and all(rows == ([1] if ".layers.0." in name else [7]) for name, rows in fused.items())
    stored = load_file(tmp_path / "patch/patch.safetensors")
    assert all(len(stored[name]) == 1 for name in fused)


def test_a_base_in_another_type_is_cast_on_the_way(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    change(model.float(), [(0, 1)])
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported")
    patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch")
    assert files(apply_patch(str(tmp_path / "base"), tmp_path / "patch", tmp_path / "out")) == files(
        tmp_path / "exported"
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_change_of_any_bits_survives(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]))
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    for name in ("base", "exported"):
        (folder / name).mkdir()
    wide = dtype.itemsize
    base, exported, footprint = {}, {}, Footprint()
    for i, shape in enumerate(shapes):
        raw = torch.randint(0, 256, (*shape, wide), generator=generator, dtype=torch.uint8)  # NaNs and -0.0 among it
        other = torch.where(torch.rand(raw.shape, generator=generator) < data.draw(st.floats(0, 1)), raw, 255 - raw)
        base[f"t{i}"], exported[f"t{i}"] = (t.view(dtype).reshape(shape) for t in (raw, other))
        changed = [row for row in range(shape[0] if shape else 0) if not torch.equal(raw[row], other[row])]
        by_rows = bool(shape) and data.draw(st.booleans())
        footprint |= Footprint({f"t{i}": frozenset(changed) if by_rows else None})
    for name, tensors in (("base", base), ("exported", exported)):
        with_config(folder / name)
        save_file(tensors, folder / name / "model.safetensors")
    patch_of(folder / "base", folder / "exported", folder / "patch", footprint)
    apply_patch(str(folder / "base"), folder / "patch", folder / "out")
    assert files(folder / "out") == files(folder / "exported")


def test_the_sign_of_a_zero_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    for name, zero in (("base", 0.0), ("exported", -0.0)):
        (tmp_path / name).mkdir()
        with_config(tmp_path / name)
        save_file(
            {"t": torch.full((2,), zero), "nan": torch.tensor([torch.nan])}, tmp_path / name / "model.safetensors"
        )
    about = patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch", Footprint.of(["t"]))
    assert about.tensors.keys() == {"t"}
    assert files(apply_patch(str(tmp_path / "base"), tmp_path / "patch", tmp_path / "out")) == files(
        tmp_path / "exported"
    )


def test_a_base_on_the_hub_is_taken_at_the_patchs_revision(
    repaired: Repaired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, exported, _ = repaired()
    cached = tmp_path / "cache/models--owner--name"
    for revision, source in (("a" * 40, base), ("b" * 40, exported)):
        shutil.copytree(source, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("b" * 40)  # the repository has moved on
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    patch_of(base, exported, tmp_path / "patch", base_name="owner/name", revision="a" * 40)
    assert files(apply_patch("owner/name", tmp_path / "patch", tmp_path / "out")) == files(exported)
    with pytest.raises(UserError, match="not the base of this patch"):
        apply_patch("owner/name", tmp_path / "patch", tmp_path / "other", revision="main")
    with pytest.raises(UserError, match="owner/absent: no such folder here, and not to be had from the Hub"):
        apply_patch("owner/absent", tmp_path / "patch", tmp_path / "other")


def test_pickles_and_foreign_weights_of_the_base_are_not_copied(repaired: Repaired, tmp_path: Path) -> None:
    base, exported, _ = repaired()
    patch_of(base, exported, tmp_path / "patch")
    for name in ("pytorch_model.bin", "rust_model.ot.pt", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (base / name).write_bytes(b"x")
    (base / "README.md").write_text("read me")
    out = apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    assert files(out).keys() == files(exported).keys() | {"README.md"}


def test_the_patch_of_an_eighth_of_the_experts_is_small(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 2}
    model = OlmoeForCausalLM(
        OlmoeConfig(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=256)
    )
    model.save_pretrained(tmp_path / "base")
    change(model, [(layer, expert) for layer in range(4) for expert in (3, 11)])  # 8 of 64: 12.5 %
    model.save_pretrained(tmp_path / "exported")
    patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch")
    size = sum(path.stat().st_size for path in (tmp_path / "patch").iterdir())
    assert 0.10 < size / (tmp_path / "exported/model.safetensors").stat().st_size < 0.14


# --- refusals -------------------------------------------------------------------------------------


def rewritten(name: str) -> Spoil:
    def spoil(base: Path, patch: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        tensors[name].view(-1)[5] += 1
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cut(name: str) -> Spoil:
    def spoil(base: Path, patch: Path) -> None:
        os.truncate(patch.parent / name, (patch.parent / name).stat().st_size - 100)

    return spoil


def flipped(name: str) -> Spoil:
    def spoil(base: Path, patch: Path) -> None:
        content = bytearray((patch / name).read_bytes())
        content[-20] ^= 1
        (patch / name).write_bytes(content)

    return spoil


def first_hash(about: dict[str, object]) -> None:
    tensors = about["tensors"]
    assert isinstance(tensors, dict)
    next(iter(tensors.values()))["after"] = "0" * 64


REFUSALS: dict[str, tuple[Spoil, str]] = {
    "wrong base": (
        rewritten("model.layers.0.mlp.experts.1.up_proj.weight"),
        "not the base of this patch.*up_",
    ),
    "base changed elsewhere": (rewritten("model.norm.weight"), "not the base of this patch: tensors that it"),
    "truncated tensors": (cut("patch/patch.safetensors"), "truncated or altered"),
    "truncated base": (cut("base/model.safetensors"), "damaged or truncated"),
    "altered tensors": (flipped("patch.safetensors"), "truncated or altered"),
    "truncated description": (cut("patch/patch.json"), "patch.json: damaged or truncated"),
    "altered description": (
        lambda base, patch: (patch / "patch.json").write_text(
            (patch / "patch.json").read_text().replace('"recipe_hash": "0', '"recipe_hash": "1')
        ),
        "altered; its content",
    ),
    "missing tensors": (lambda base, patch: (patch / "patch.safetensors").unlink(), "patch.safetensors: not found"),
    "missing description": (lambda base, patch: (patch / "patch.json").unlink(), "patch.json: not found"),
    "missing base": (lambda base, patch: shutil.rmtree(base), "no folder here and no Hub id"),
    "pickled base": (
        lambda base, patch: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "found pytorch_model.bin",
    ),
    "another format": (
        reseal(lambda about: about.update(format="routealign-patch-3")),
        "format: found .routealign-patch-3.",
    ),
    "no footprint": (reseal(lambda about: about.update(footprint=None)), "touches tensor '.*footprint leaves out"),
    "a tensor outside its footprint": (
        reseal(lambda about: about["footprint"].pop("model.layers.2.mlp.gate.weight")),
        "touches tensor 'model.layers.2.mlp.gate.weight', which its own footprint leaves out",
    ),
    "not a patch": (lambda base, patch: (patch / "patch.json").write_text("[]"), "format: found .list."),
    "a wrong hash of the result": (reseal(first_hash), "does not give the exported one"),
    "a file outside the folder": (
        reseal(lambda about: about.update(files={"../x.safetensors": {"metadata": {}, "tensors": []}})),
        "names the file '../x.safetensors'",
    ),
    "a config outside the folder": (
        reseal(lambda about: about.update(configs={"../a": ""})),
        "names the file '../a'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_patch_of_this_base_is_refused_in_one_line_and_nothing_is_written(
    case: str, repaired: Repaired, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, exported, _ = repaired()
    patch_of(base, exported, tmp_path / "patch")
    spoil, message = REFUSALS[case]
    spoil(base, tmp_path / "patch")
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["apply", str(base), str(tmp_path / "patch"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    with pytest.raises(UserError, match=message):
        apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_an_existing_folder_is_left_alone(repaired: Repaired, tmp_path: Path) -> None:
    base, exported, _ = repaired()
    patch_of(base, exported, tmp_path / "patch")
    before = files(exported)
    with pytest.raises(UserError, match="exists already"):
        apply_patch(str(base), tmp_path / "patch", exported)
    assert files(exported) == before


def test_a_base_in_another_format_gets_no_patch(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported")
    with pytest.raises(UserError, match="stored in another format"):
        patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_the_path_of_a_local_base_stays_on_this_machine(repaired: Repaired, tmp_path: Path) -> None:
    base, exported, _ = repaired()
    patch_of(base, exported, tmp_path / "patch")
    text = (tmp_path / "patch/patch.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["base"] == {"name": "base", "revision": None}
    assert patch_of(base, exported, tmp_path / "hub", base_name="owner/name", revision="abc").base.name == "owner/name"


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time, pathlib, torch, psutil
from trainer.model import weight_files as checkpoint_files
from trainer.release import patch
base, where, out = sys.argv[1:]
torch.zeros(1)
def used(): return psutil.Process().memory_info().rss
peak, done = [0], False
def watch():
    while not done:
        peak[0] = max(peak[0], used()); time.sleep(0.002)
start = used(); thread = threading.Thread(target=watch); thread.start()
patch.apply_patch(base, pathlib.Path(where), pathlib.Path(out))
done = True; thread.join()
print(peak[0] - start)
"""


def random_checkpoint(folder: Path, shards: int, megabytes: int, moved: bool = False) -> None:
    """Shards of 8 tensors each, of which one differs where `moved`."""
    folder.mkdir()
    with_config(folder)
    weight_map, width = {}, megabytes * 2**20 // 8 // 4 // 1024
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{shard}.{i}.weight" for i in range(8)]
        seeds = [8 * shard + i + (10**6 if i == 3 and moved else 0) for i in range(8)]
        drawn = [torch.rand(width, 1024, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        save_file(dict(zip(names, drawn, strict=True)), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": shards * 8 * width * 4096}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("shards", "megabytes"), [(4, 50), pytest.param(5, 205, marks=pytest.mark.slow)], ids=["200MB", "1GB"]
)
def test_applying_a_patch_holds_no_more_than_one_shard(shards: int, megabytes: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "base", shards, megabytes)
    random_checkpoint(tmp_path / "exported", shards, megabytes, moved=True)
    moved = Footprint.of(f"layers.{shard}.3.weight" for shard in range(shards))
    patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch", moved)
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("base", "patch", "out"))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert files(tmp_path / "out") == files(tmp_path / "exported")
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    print(f"peak {peak / largest:.2f} x the largest shard")
    assert 0 < peak < 0.6 * largest


def test_the_organisms_patch_is_small_and_exact(organism: Organism, tmp_path: Path) -> None:
    base = organism.path / "model"
    model = OlmoeForCausalLM.from_pretrained(base)
    change(model, [(layer, expert) for layer in range(4) for expert in (0, 9)])
    model.save_pretrained(tmp_path / "exported")
    patch_of(base, tmp_path / "exported", tmp_path / "patch")
    out = apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    assert files(out).items() >= files(tmp_path / "exported").items()
    share = (tmp_path / "patch/patch.safetensors").stat().st_size / (base / "model.safetensors").stat().st_size
    print(f"patch: {share:.1%} of the checkpoint")
    assert share < 0.14
