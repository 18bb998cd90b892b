"""A patch says what it may touch, and touches nothing else."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from tests.release.conftest import Repaired, allowed, change, files, patch_of, reseal
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.moe.footprint import Footprint
from trainer.release.export import save_checkpoint
from trainer.release.patch import apply_patch, read_patch


@pytest.mark.parametrize(("family", "rows"), [("olmoe", None), ("gpt_oss", [1])])
def test_the_patch_says_in_the_files_own_names_what_may_be_touched(
    family: str, rows: list[int] | None, repaired: Repaired, tmp_path: Path
) -> None:
    base, exported, footprint = repaired(family)
    about = patch_of(base, exported, tmp_path / "patch", footprint)
    assert about.footprint is not None and about.tensors.keys() <= about.footprint.keys()
    first = {name: allowed for name, allowed in about.footprint.items() if ".layers.0." in name and "expert" in name}
    one = ".experts.1." if rows is None else ".experts."
    assert first and all(one in name and allowed == rows for name, allowed in first.items())
    assert not any("self_attn" in name or "norm" in name for name in about.footprint)
    assert read_patch(tmp_path / "patch") == about


def test_a_patch_of_more_than_what_may_be_touched_is_not_written(repaired: Repaired, tmp_path: Path) -> None:
    base, exported, footprint = repaired("gpt_oss")
    experts = {name: rows for name, rows in footprint.rows.items() if rows is not None}
    for less in (Footprint(experts), Footprint({**footprint.rows, **dict.fromkeys(experts, frozenset({7}))})):
        with pytest.raises(RuntimeError, match="moved outside the footprint"):
            patch_of(base, exported, tmp_path / "patch", less)
    assert not (tmp_path / "patch").exists()


def test_of_a_tensor_open_in_some_rows_no_other_row_is_in_the_patch(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "base")
    most = [(0, expert) for expert in range(6)]
    footprint = allowed(model, change(model, most))
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "exported")
    about = patch_of(tmp_path / "base", tmp_path / "exported", tmp_path / "patch", footprint)
    fused = [touched.rows for name, touched in about.tensors.items() if ".experts." in name]
    assert fused and all(rows == list(range(6)) for rows in fused)
    out = apply_patch(str(tmp_path / "base"), tmp_path / "patch", tmp_path / "out")
    assert files(out) == files(tmp_path / "exported")


def other_rows(about: dict[str, Any]) -> None:
    about["footprint"] |= {name: [2, 3] for name, rows in about["footprint"].items() if rows == [1]}


def whole_tensor(about: dict[str, Any]) -> None:
    name = next(name for name, rows in about["footprint"].items() if rows == [1])
    about["tensors"][name]["rows"] = None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(other_rows, "touches row 1 of tensor '.*experts"), (whole_tensor, "touches all of tensor '.*experts")],
)
def test_a_patch_that_touches_a_row_outside_its_footprint_is_refused(
    spoil: Callable[[dict[str, Any]], None], message: str, repaired: Repaired, tmp_path: Path
) -> None:
    base, exported, footprint = repaired("gpt_oss")
    patch_of(base, exported, tmp_path / "patch", footprint)
    reseal(spoil)(base, tmp_path / "patch")
    with pytest.raises(UserError, match=f"patch.json: {message}.*its own footprint leaves out"):
        apply_patch(str(base), tmp_path / "patch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patch_of_the_first_format_still_applies(repaired: Repaired, tmp_path: Path) -> None:
    """It does not say what may be touched."""
    base, exported, footprint = repaired("gpt_oss")
    patch_of(base, exported, tmp_path / "patch", footprint)
    content = json.loads((tmp_path / "patch/patch.json").read_text())
    for name in ("footprint", "sha256"):
        del content[name]
    content["format"] = "routealign-patch-1"
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tmp_path / "patch/patch.json").write_text(json.dumps(content | {"sha256": seal}))
    assert read_patch(tmp_path / "patch").footprint is None
    assert files(apply_patch(str(base), tmp_path / "patch", tmp_path / "out")) == files(exported)
