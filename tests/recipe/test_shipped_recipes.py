"""Every recipe in the repository is valid."""

from pathlib import Path

import pytest

from trainer.methods.table import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_shipped_recipe_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.resolved_yaml())
    assert load_recipe(resolved) == recipe


def test_the_faithful_preset_has_no_retain_term_and_no_rows_of_ours() -> None:
    for path in RECIPES:
        if path.name != "rasa-faithful.yaml":
            continue
        repair = load_recipe(path).repair
        assert repair.retain_weight == 0
        mix = (repair.recombined, repair.robust, repair.anchors, repair.wrapped_benign, repair.plain_benign)
        assert not any(mix) and repair.borderline == 0
