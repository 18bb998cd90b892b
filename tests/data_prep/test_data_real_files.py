"""The loaders on true public benchmark files, where they are at hand. Counts and ids only, never a row's text."""

import os
from pathlib import Path

import pytest

from data_prep.config import DataConfig, JailbreakConfig
from data_prep.corpus import load_corpus
from data_prep.loaders import Source, load
from data_prep.schema import Kind
from data_prep.wrappers import load_wrappers, recombine

SHARED = Path(os.environ.get("ROUTEALIGN_SHARED", Path(__file__).parents[2] / ".." / "shared"))
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no public benchmark files at hand")


@pytest.mark.parametrize(
    ("format", "file", "column", "kind", "n"),
    [
        ("advbench", "advbench/harmful_behaviors.csv", None, "harmful", 520),
        ("advbench", "advbench-pair50/harmful_behaviors_pair.csv", None, "harmful", 50),
        ("records", "harmbench/harmbench_behaviors_text_val.csv", "Behavior", "harmful", 80),
        ("records", "strongreject/strongreject_dataset.csv", "forbidden_prompt", "harmful", 313),
        ("xstest", "xstest/xstest_prompts.csv", None, "borderline", 250),
        ("xstest", "xstest/xstest_prompts.csv", None, "harmful", 200),
        ("alpaca", "alpaca-harmless/harmless_test.json", None, "benign", 6266),
        ("alpaca", "alpaca-demo/alpaca_en_demo.json", None, "benign", 999),
        ("records", "truthfulqa/TruthfulQA.csv", "Question", "capability", 817),
        ("records", "truthfulqa/TruthfulQA.csv", "Type", "capability", 817),
        ("qa", "gsm8k/test.jsonl", None, "capability", 1319),
    ],
)
def test_rows(format: str, file: str, column: str | None, kind: Kind, n: int) -> None:
    assert len(load(format, Source(str(DATA / file), kind, column))) == n


def test_alpaca_input_is_joined() -> None:
    rows = load("alpaca", Source(str(DATA / "alpaca-demo/alpaca_en_demo.json"), "benign"))
    assert sum("\n\n" in row.text for row in rows) >= 412


def test_templates() -> None:
    path = str(DATA / "gptfuzz/seed_short_25.csv")
    config = JailbreakConfig(path=path, seen=["seed_short_25[0:20]"], unseen=["seed_short_25[20:25]"])
    wrappers = load_wrappers(config)
    assert len(wrappers) == 25
    made = recombine(wrappers[:20], [], 50, 0)
    assert all(wrapper.text.count(config.placeholder) == 1 for wrapper in made)


def test_a_whole_recipe() -> None:
    config = {
        "harmful": {
            "path": str(DATA / "advbench/harmful_behaviors.csv"),
            "format": "advbench",
            "train": "0:320",
            "test": "420:520",
        },
        "benign": {
            "path": str(DATA / "alpaca-harmless/harmless_val.json"),
            "format": "alpaca",
            "test_path": str(DATA / "alpaca-harmless/harmless_test.json"),
            "train": 150,
            "test": 100,
        },
        "borderline": {
            "path": str(DATA / "xstest/xstest_prompts.csv"),
            "format": "xstest",
            "train": "0::2",
            "test": "1::2",
        },
        "jailbreaks": {"path": str(DATA / "gptfuzz/seed_short_25.csv"), "seen": ["seed_short_25[0:6]"]},
        "capability": [{"name": "gsm8k", "path": str(DATA / "gsm8k/test.jsonl"), "metric": "token_accuracy"}],
    }
    corpus = load_corpus(DataConfig.model_validate(config), seed=0)
    assert len(corpus.harmful.test) == 100 and corpus.harmful.test[0].id == "harmful_behaviors:420"
    assert (len(corpus.borderline.train), len(corpus.borderline.test)) == (125, 125)
    assert len(corpus.benign.train) == 150 and len(corpus.tasks[0].prompts) == 100
