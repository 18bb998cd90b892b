"""Each way in which an export can go wrong, broken on purpose: the audit that a run makes refuses it in one line.

| name | how it is broken | the refusal says |
|---|---|---|
| swapped | `fuse` writes two critical experts of a layer into each other's place | does not hold what was trained |
| shifted | `fuse` writes every critical expert one index too far | moved outside the footprint |
| left out | `fuse` forgets one critical expert | does not hold what was trained |
| half merged | `fuse` adds half of a LoRA | does not hold what was trained |
| router | a router moves that no stage trains | moved outside the footprint |
| trained router | a router that a stage trains gets other values | does not hold what was trained |
| shared | a shared expert moves that is not in the set | moved outside the footprint |
| trained shared | one that is in the set gets other values | does not hold what was trained |
| attention | one number of an attention weight moves | moved outside the footprint |
| dtype | one tensor is written in another type | moved outside the footprint |
| lost tensor | a tensor that no class loads is left out | tensors of the base are left out |
| lost file | a file of the base is left out | not the base's file |
| altered file | the configuration is written anew | not the base's file |
| added file | a file is written that the base has not | not the base's file |
| untrained | nothing is trained | nothing was trained |
| base again | the base's weights are written | does not hold what was trained |
| other answers | weights are right and the model answers otherwise | answers otherwise than the trained model |
| NaN | one exported number is NaN | holds NaN or infinity |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from tests.moe.families import FAMILIES
from tests.release.bench import Bench, one_thread
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.moe.experts import SplitModel
from trainer.pipeline import publish
from trainer.release import audit as auditing
from trainer.release import export as exporting

__all__ = ["one_thread"]

FIRST = "model.layers.0.mlp."


def after_fuse(change: Callable[[Any], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """The model is changed when it is fused."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        fuse = SplitModel.fuse

        @torch.no_grad()
        def careless(self: SplitModel) -> None:
            fuse(self)
            change(self.model)

        monkeypatch.setattr(SplitModel, "fuse", careless)

    return broken


def before_fuse(change: Callable[[SplitModel], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """What is fused is changed just before."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        fuse = SplitModel.fuse

        @torch.no_grad()
        def careless(self: SplitModel) -> None:
            change(self)
            fuse(self)

        monkeypatch.setattr(SplitModel, "fuse", careless)

    return broken


def after_write(change: Callable[[Path], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """The folder is changed when it is written."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        write = exporting.export_checkpoint

        def careless(model: Any, base: Path, folder: Path, section: Any) -> None:
            write(model, base, folder, section)
            change(folder)

        monkeypatch.setattr(publish, "export_checkpoint", careless)

    return broken


def move(name: str) -> Callable[[Any], object]:
    return lambda model: model.get_parameter(name).data.view(-1)[0].add_(0.01)


def stacks(model: Any) -> list[Tensor]:
    experts = model.get_submodule(FIRST + "experts")
    return [experts.gate_up_proj.data, experts.down_proj.data]


def swap(model: Any) -> None:
    for stack in stacks(model):
        stack[[1, 5]] = stack[[5, 1]]


def shift(split: SplitModel) -> None:
    for _, critical in split._split_layers():
        critical.indices += 1


def forget(split: SplitModel) -> None:
    experts, critical = next(iter(split._split_layers()))
    for name in ("gate_up_proj", "down_proj"):
        getattr(critical, name)[1] = getattr(experts, name)[5]


def halve(split: SplitModel) -> None:
    for name, parameter in split.trainable().items():
        if "lora_B" in name:
            parameter.data *= 0.5


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return changed


def base_again(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder.parent.parent / "base/model.safetensors").read_bytes())


def another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader would that reads the configuration otherwise: right weights, another model."""
    read = auditing.read_model

    def other(folder: Path, dtype: Any) -> Any:
        model = read(folder, dtype)
        for layer in model.model.layers:
            layer.mlp.gate.top_k = 1
        return model

    monkeypatch.setattr(auditing, "read_model", other)


def nothing(_: pytest.MonkeyPatch) -> None: ...


@dataclass(frozen=True)
class Mutation:
    name: str
    broken: Callable[[pytest.MonkeyPatch], None]
    said: str
    family: str = "olmoe"
    bench: dict[str, Any] = field(default_factory=dict)


GATE, ATTENTION = FIRST + "gate.weight", "model.layers.1.self_attn.o_proj.weight"
SHARED = FIRST + "shared_expert.down_proj.weight"
LOST = r"the export does not hold what was trained: \['model\.layers\.0\.mlp\."
MUTATIONS = [
    Mutation("swapped", after_fuse(swap), LOST + r"experts\.gate_up_proj\[1\]', .*\[5\]'"),
    Mutation("swapped", after_fuse(swap), LOST + r"experts\.gate_up_proj\[1\]'", bench={"lora_rank": 4}),
    Mutation("shifted", before_fuse(shift), r"moved outside the footprint: \['model\.layers\.0\.mlp\.experts\.2\."),
    Mutation("left out", before_fuse(forget), LOST + r"experts\.gate_up_proj\[5\]'"),
    Mutation("half merged", before_fuse(halve), LOST + r"experts\.gate_up_proj\[1\]'", bench={"lora_rank": 4}),
    Mutation("router", after_fuse(move(GATE)), rf"moved outside the footprint: \['{GATE}'\]"),
    Mutation("trained router", after_fuse(move(GATE)), LOST + r"gate\.weight'\]", bench={"routers": True}),
    Mutation("shared", after_fuse(move(SHARED)), rf"moved outside the footprint: \['{SHARED}'\]", "qwen2_moe"),
    Mutation("trained shared", after_fuse(move(SHARED)), LOST + "shared_expert", "qwen2_moe", {"shared": True}),
    Mutation("attention", after_fuse(move(ATTENTION)), rf"moved outside the footprint: \['{ATTENTION}'\]"),
    Mutation(
        "dtype",
        after_write(tensors(lambda found: found.update({ATTENTION: found[ATTENTION].double()}))),
        rf"moved outside the footprint: \['{ATTENTION}'\]",
    ),
    Mutation(
        "lost tensor",
        after_write(tensors(lambda found: found.pop("mtp.fc.weight"))),
        r"left out: \['mtp\.fc\.weight'\]",
    ),
    Mutation("lost file", after_write(lambda at: (at / "LICENSE").unlink()), r"not the base's file: \['LICENSE'\]"),
    Mutation(
        "altered file",
        after_write(lambda at: (at / "config.json").write_text((at / "config.json").read_text() + "\n")),
        r"not the base's file: \['config\.json'\]",
    ),
    Mutation(
        "added file", after_write(lambda at: (at / "x.json").write_text("")), r"not the base's file: \['x\.json'\]"
    ),
    Mutation("untrained", nothing, "nothing was trained: every weight of the export is", bench={"train": False}),
    Mutation("base again", after_write(base_again), LOST),
    Mutation("other answers", another_answer, r"answers otherwise than the trained model: its logits differ by \d+"),
    Mutation(
        "NaN",
        after_write(tensors(lambda found: found[FIRST + "experts.1.down_proj.weight"].view(-1)[0].fill_(torch.nan))),
        r"tensor 'model\.layers\.0\.mlp\.experts\.1\.down_proj\.weight' holds NaN or infinity",
    ),
]


def made(tmp_path: Path, family: str) -> Path:
    """A base with a licence and a tensor that the model class does not load."""
    model = tiny_model() if family == "olmoe" else next(f for f in FAMILIES if f.model_type == family).build()
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (base / "LICENSE").write_text("terms")
    tensors(lambda found: found.update({"mtp.fc.weight": torch.ones(3)}))(base)
    return base


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_audit_of_a_run_refuses(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.of(made(tmp_path, mutation.family), **mutation.bench)
    mutation.broken(monkeypatch)
    with pytest.raises(UserError, match=mutation.said) as refused:
        bench.export(routers=mutation.bench.get("routers", False))
    assert "\n" not in str(refused.value)
    assert not (bench.folder / "patch.json").exists()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"shared": True}, {"routers": True}], ids=str)
def test_and_passes_what_is_not_broken(options: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench.of(made(tmp_path, "qwen2_moe"), **options)
    found = bench.export(routers="routers" in options)
    assert found == json.loads((bench.folder / "audit.json").read_text())
    assert (found["untouched_identical"], found["reload_ok"]) == (True, True)
    assert found["moved_outside"] == found["not_as_trained"] == found["files_differ"] == found["not_moved"] == []
    assert (found["experts_changed"], found["shared_experts_changed"]) == (3, int("shared" in options))
    assert found["reload_tokens"] == 256 and found["reload_experts_reached"] == found["experts_total"]


def test_the_table_above_names_every_mutation() -> None:
    assert __doc__ is not None
    named = {line.split("|")[1].strip() for line in __doc__.splitlines() if line.startswith("|")} - {"name", "---"}
    assert named == {mutation.name for mutation in MUTATIONS}


def test_an_expert_that_was_to_change_and_did_not_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made(tmp_path, "olmoe")
    bench = Bench.of(base)
    with torch.no_grad():
        for experts, critical in bench.trained._split_layers():
            for name in ("gate_up_proj", "down_proj"):
                if 5 in critical.indices:
                    getattr(critical, name)[1] = getattr(experts, name)[5]
    found = bench.export(routers=True)
    routers = [f"layer {layer} router" for layer in range(3)]
    assert found["not_moved"] == ["layer 0 expert 5", *routers]
    assert "did not change, though it was to be trained: layer 0 expert 5" in "".join(capsys.readouterr())
