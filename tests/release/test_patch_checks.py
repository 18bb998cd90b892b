"""A patch comes from others: it may say what an allow-list holds, and all else ends in one line."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from tests.release.conftest import files, patch_of
from tests.tiny import tiny_model
from trainer.cli.app import main
from trainer.moe.footprint import Footprint
from trainer.release.patch import apply_patch

Tree = dict[str, Any]
FUSED, WHOLE, KEPT, NUMBERS = "fused.weight", "whole.weight", "kept.weight", "numbers"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, exported/ and patch/: rows 1 and 3 of one tensor and all of another repaired, two tensors kept."""
    folder = tmp_path_factory.mktemp("made")
    tensors = {FUSED: torch.zeros(4, 3), WHOLE: torch.zeros(2, 2), KEPT: torch.ones(3), NUMBERS: torch.arange(3)}
    for name in ("base", "exported"):
        tiny_model().config.save_pretrained(folder / name)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        tensors[FUSED], tensors[WHOLE] = tensors[FUSED].clone(), torch.ones(2, 2)
        tensors[FUSED][[1, 3]] = 1.0
    footprint = Footprint({FUSED: frozenset({1, 2, 3}), WHOLE: None})
    patch_of(folder / "base", folder / "exported", folder / "patch", footprint)
    return folder


def sealed(patch: Path, tree: object) -> None:
    """Write `patch.json` with a seal that fits, as anybody can."""
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if key != "sha256"}
        tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (patch / "patch.json").write_text(json.dumps(tree))


def about_of(patch: Path) -> Tree:
    tree: Tree = json.loads((patch / "patch.json").read_text())
    return tree


def applied(made: Path, patch: Path, out: Path) -> str:
    """The line of a refusal, after which nothing may be there; empty where the checkpoint is."""
    around = sorted(out.parent.iterdir())
    try:
        apply_patch(str(made / "base"), patch, out)
    except UserError as error:
        assert sorted(out.parent.iterdir()) == around
        return str(error)
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], t) for name, t in load_file(made / "exported/model.safetensors").items())
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    shutil.rmtree(out)
    return ""


def setting(*path: str, to: object) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        at = tree
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = to

    return change


def config(**keys: object) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        tree["configs"]["config.json"] = json.dumps(json.loads(tree["configs"]["config.json"]) | keys)

    return change


def layout(*names: str) -> Callable[[Tree], None]:
    return setting("files", "model.safetensors", "tensors", to=list(names))


ALL = (FUSED, KEPT, NUMBERS, WHOLE)
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]

REFUSED: dict[str, tuple[Callable[[Tree], object], str]] = {
    "code of a configuration": (config(auto_map={"AutoModel": "evil.Model"}), r"config.json: auto_map differs"),
    "another class": (config(architectures=["Other"]), "architectures differs"),
    "a number of a configuration": (config(num_experts_per_tok=1), "num_experts_per_tok differs"),
    "a type of a configuration that is none": (config(dtype="load"), "dtype: found 'load'.*allowed: float64, float32"),
    "a version that is none": (config(transformers_version=[]), "transformers_version: found"),
    "a configuration that is no JSON": (setting("configs", "config.json", to="{"), "config.json: damaged"),
    "a configuration that is no object": (setting("configs", "config.json", to="[]"), "config.json: found a list"),
    "a configuration nested too deeply": (
        setting("configs", "config.json", to="[" * 100_000),
        "config.json: nested too deeply",
    ),
    "a configuration the base lacks": (
        setting("configs", "generation_config.json", to='{"custom_generate": "evil"}'),
        "generation_config.json: custom_generate differs",
    ),
    "another file": (setting("configs", "modeling.py", to="import os"), "configs: names the file 'modeling.py'"),
    "a type by attribute": (setting("cast", to={WHOLE: "load"}), f"cast.{WHOLE}: found 'load'"),
    "a type by another attribute": (setting("cast", to={WHOLE: "__class__"}), "cast.*allowed: float64"),
    "numbers cast": (setting("cast", to={NUMBERS: "float32"}), f"cast.{NUMBERS}: found in the base torch.int64"),
    "a cast of what the patch stores otherwise": (
        setting("cast", to={WHOLE: "float16"}),
        "stored as torch.float32, allowed: torch.float16",
    ),
    "rows below 0": (setting("tensors", FUSED, "rows", to=[-3, -1]), f"tensors.{FUSED}.rows: found .*row numbers"),
    "no rows": (setting("tensors", FUSED, "rows", to=[]), f"tensors.{FUSED}.rows: found"),
    "rows twice": (setting("tensors", FUSED, "rows", to=[1, 1]), f"tensors.{FUSED}.rows: found"),
    "rows out of order": (setting("tensors", FUSED, "rows", to=[3, 1]), f"tensors.{FUSED}.rows: found"),
    "true as a row": (setting("tensors", FUSED, "rows", to=[True, 3]), f"tensors.{FUSED}.rows"),
    "half a row": (setting("tensors", FUSED, "rows", to=[1.5, 3]), f"tensors.{FUSED}.rows"),
    "a huge row": (setting("tensors", FUSED, "rows", to=[1, 2**80]), f"tensors.{FUSED}.rows: found"),
    "rows beyond the tensor": (
        lambda tree: [
            setting("footprint", FUSED, to=None)(tree),
            setting("tensors", FUSED, "rows", to=[1, 4])(tree),
        ],
        f"tensors.{FUSED}.rows: found row 4, allowed: 0 to 3",
    ),
    "more rows than stored": (
        setting("tensors", FUSED, "rows", to=[1, 2, 3]),
        r"stored as \[2, 3\], allowed: \[3, 3\]",
    ),
    "all rows where some are stored": (
        lambda tree: [setting("footprint", FUSED, to=None)(tree), setting("tensors", FUSED, "rows", to=None)(tree)],
        r"stored as \[2, 3\], allowed: \[4, 3\]",
    ),
    "a footprint beyond the tensor": (setting("footprint", FUSED, to=[1, 3, 9]), f"footprint.{FUSED}: found row 9"),
    "a footprint beyond a tensor kept": (setting("footprint", KEPT, to=[3]), f"footprint.{KEPT}: found row 3"),
    "an empty footprint": (setting("footprint", KEPT, to=[]), f"footprint.{KEPT}: found"),
    "a footprint of no tensor": (
        setting("footprint", "other", to=None),
        "footprint: tensor 'other' is in none of the",
    ),
    "a repaired tensor left out": (layout(FUSED, KEPT, NUMBERS), f"tensors: tensor '{WHOLE}' is in none of the files"),
    "a kept tensor left out": (layout(FUSED, NUMBERS, WHOLE), f"leaves out tensor '{KEPT}' of the base"),
    "a tensor twice": (layout(*ALL, KEPT), f"tensor '{KEPT}' is named 2 times"),
    "a tensor of nobody": (layout(*ALL, "other"), "no tensor 'other'"),
    "no tensor": (layout(), "found an empty list"),
    "a file that nothing loads": (
        lambda tree: tree.update(files={"other.safetensors": tree["files"]["model.safetensors"]}),
        "allowed without index_metadata: model.safetensors",
    ),
    "an index beside the file that is loaded first": (
        setting("index_metadata", to={}),
        "allowed with index_metadata: other names than model.safetensors",
    ),
    "a hidden file": (
        lambda tree: tree.update(files={".safetensors": tree["files"]["model.safetensors"]}),
        "names the file '.safetensors'",
    ),
    "a list for a text": (setting("untouched", to=[1]), r"untouched: found \[1\] .list., allowed: a valid string"),
    "a key too many": (setting("tensors", FUSED, "code", to="x"), f"tensors.{FUSED}.code: unknown key"),
    "a key too few": (lambda tree: tree.pop("cast"), "cast: missing"),
    "no hash": (setting("untouched", to="0"), "untouched: found '0'.*a hex sha256"),
    "a revision that leads elsewhere": (
        setting("base", to={"name": "base", "revision": "../../x"}),
        r"base.revision: found '\.\./\.\./x'",
    ),
    "nested too deeply": (setting("index_metadata", to={"x": DEEP}), "nested too deeply; allowed: 32 levels"),
    "a number without end": (
        setting("index_metadata", to={"x": float("inf")}),
        "the number Infinity, allowed: finite",
    ),
    "text that is not Unicode": (setting("versions", to={"x": "\ud800"}), "text that is not Unicode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sealed_patch_that_says_what_none_may_say_is_refused(case: str, made: Path, tmp_path: Path) -> None:
    patch = shutil.copytree(made / "patch", tmp_path / "patch")
    change, message = REFUSED[case]
    tree = about_of(patch)
    change(tree)
    sealed(patch, tree)
    with pytest.raises(UserError, match=message):
        apply_patch(str(made / "base"), patch, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["patch"]


def test_the_type_and_the_version_of_a_configuration_may_differ(made: Path, tmp_path: Path) -> None:
    patch = shutil.copytree(made / "patch", tmp_path / "patch")
    tree = about_of(patch)
    config(dtype="bfloat16", transformers_version="6.0.0")(tree)
    sealed(patch, tree)
    out = apply_patch(str(made / "base"), patch, tmp_path / "out")
    assert (out / "config.json").read_text() == tree["configs"]["config.json"]
    assert load_file(out / "model.safetensors")[WHOLE].eq(1).all()


def test_no_patch_is_made_of_an_export_that_none_could_give(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "exported", tmp_path / "exported")
    tree = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(tree | {"rope_theta": 1.0}))
    with pytest.raises(UserError, match=r"config.json: rope_theta differs from the base's"):
        patch_of(made / "base", other, tmp_path / "patch")
    few = load_file(made / "exported/model.safetensors")
    del few[KEPT]
    save_file(few, other / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{KEPT}' is not in the export"):
        patch_of(made / "base", other, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


# --- where it is written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", r"--out: found '\.', which names no new folder"),
        ("..", r"--out: found '\.\.', which"),
        ("", "--out: found '.', which"),
        ("there", "--out: there exists already"),
        ("there/file", "--out: there/file exists already"),
        ("link", "--out: link exists already, as a link"),
        ("dangling", "--out: dangling exists already, as a link"),
        ("a\0b", "--out: found 'a.*names no new folder"),
        ("a" * 300, r"--out: found 'aaa.*names no new folder \(File name too long\)"),
        ("there/file/new/deep", "--out: found 'there/file/new/deep', but .*there/file is no folder"),
    ],
)
def test_a_place_that_is_taken_or_none_is_refused_by_name(
    out: str, message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("there", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there/file").write_text("mine")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        apply_patch(str(made / "base"), made / "patch", Path(out))
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_the_user_beside_the_new_one_stay(made: Path, tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("out.partial", ".out.partial")]
    for folder in mine:
        folder.mkdir()
        (folder / "mine").write_text("mine")
    (tmp_path / "out").mkdir()  # empty: it may be taken
    apply_patch(str(made / "base"), made / "patch", tmp_path / "out")
    assert files(tmp_path / "out") == files(made / "exported")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out.partial").stat().st_mode
    assert all((folder / "mine").read_text() == "mine" for folder in mine)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_refusal_leaves_no_folder_on_the_way_behind(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the base of this patch"):
        apply_patch(str(made / "exported"), made / "patch", tmp_path / "new/deep/out")
    assert list(tmp_path.iterdir()) == []
    apply_patch(str(made / "base"), made / "patch", tmp_path / "new/deep/out")
    assert (tmp_path / "new/deep/out/config.json").is_file()


@pytest.mark.parametrize(
    ("base", "revision", "message"),
    [
        ("base/config.json", None, "BASE: found '.*config.json', a file; allowed: a folder, or owner/name"),
        ("", None, "BASE: found '', an empty name"),
        ("odd", None, r"odd/config\.json: found a list, allowed: an object"),
        ("odder", None, r"odder/config\.json: damaged or truncated"),
        ("empty", None, r"empty/config\.json: not found; allowed as a base: the folder of a model"),
        ("base", "main", "--revision: found 'main' .str. with the local folder .*base; allowed: with a Hub id"),
    ],
)
def test_a_base_that_is_none_is_refused_by_name(
    base: str, revision: str | None, message: str, made: Path, tmp_path: Path
) -> None:
    for name, content in (("odd", b"[]"), ("odder", b"\xff"), ("empty", None)):
        (made / name).mkdir(exist_ok=True)
        if content is not None:
            (made / name / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        apply_patch(str(made / base) if base else "", made / "patch", tmp_path / "out", revision)
    assert not (tmp_path / "out").exists()


def test_no_control_character_of_a_patch_reaches_the_terminal(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    patch = shutil.copytree(made / "patch", tmp_path / "patch")
    tree = about_of(patch)
    for change in (
        layout(*ALL, "x\x1b[2J\u202e\r\n\x9b"),
        setting("base", to={"name": "\x1b]0;x\x07", "revision": None}),
    ):
        change(tree)
    sealed(patch, tree)
    with pytest.raises(SystemExit) as stopped:
        main(["apply", str(made / "base"), str(patch), "--out", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and "\\x1b" in err
    assert not set("\x1b\x9b\x07\r\u202e") & set(out + err)


# --- anything at all ------------------------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([FUSED, KEPT, "float32", "model.safetensors", "../x", "\x1b[2J", "\ud800", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one part, found on a random way down, left out, put twice or replaced."""
    tree = copy.deepcopy(tree)
    at, last = tree, draw(st.sampled_from(sorted(tree)))
    while isinstance(at[last], dict | list) and at[last] and draw(st.integers(0, 3)):
        at = at[last]
        last = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    kind = draw(st.sampled_from(["replace", "replace", "leave out", "add"]))
    if kind == "leave out":
        del at[last]
    elif kind == "add" and isinstance(at, dict):
        at[draw(st.text(max_size=4) | st.sampled_from([FUSED, KEPT, "x.safetensors"]))] = draw(VALUES)
    elif kind == "add":
        at.append(draw(VALUES))
    else:
        at[last] = draw(VALUES)
    return tree


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_a_description_says_the_end_is_a_checkpoint_or_one_line(data: st.DataObject, made: Path) -> None:
    patch = made / "fuzzed-description"
    shutil.copytree(made / "patch", patch, dirs_exist_ok=True)
    tree = about_of(made / "patch")
    for _ in range(data.draw(st.integers(1, 2))):
        tree = data.draw(st.composite(mutated)(tree)) if isinstance(tree, dict) and tree else tree
    sealed(patch, tree)
    applied(made, patch, made / "out")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_the_tensors_file_says_the_end_is_a_checkpoint_or_one_line(data: st.DataObject, made: Path) -> None:
    patch = made / "fuzzed-tensors"
    shutil.copytree(made / "patch", patch, dirs_exist_ok=True)
    content = (made / "patch/patch.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = data.draw(st.sampled_from(["header", "dtype", "shape", "length", "cut", "bytes"]))
    name = data.draw(st.sampled_from([FUSED, WHOLE]))
    if kind == "header":
        header = data.draw(st.composite(mutated)(header))
    elif kind == "dtype":
        header[name]["dtype"] = data.draw(
            st.sampled_from(["BOOL", "U8", "I32", "U32", "F8_E8M0", "F4", "C64", "F6_E2M3", "F1", "BF16"])
        )
    elif kind == "shape":
        header[name]["shape"] = data.draw(st.lists(st.integers(0, 2**33), max_size=4))
    text = json.dumps(header).encode()
    size = data.draw(st.integers(0, 2**64 - 1)) if kind == "length" else len(text)
    spoiled = size.to_bytes(8, "little") + text + rest
    if kind == "cut":
        spoiled = spoiled[: data.draw(st.integers(0, len(spoiled) - 1))]
    if kind == "bytes":
        at = data.draw(st.integers(0, len(spoiled) - 1))
        spoiled = spoiled[:at] + data.draw(st.binary(min_size=1, max_size=4)) + spoiled[at + 1 :]
    (patch / "patch.safetensors").write_bytes(spoiled)
    sealed(patch, about_of(made / "patch") | {"patch_sha256": hashlib.sha256(spoiled).hexdigest()})
    applied(made, patch, made / "out")
