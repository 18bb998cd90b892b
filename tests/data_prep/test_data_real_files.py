"""The loaders on true public benchmark files, where they are at hand. Counts and ids only, never a row's text."""

import os
from pathlib import Path

import pytest

from data_prep.benchmarks.harmbench import COPYRIGHT
from data_prep.config import DataConfig, JailbreakConfig
from data_prep.corpus import load_corpus
from data_prep.loaders import Source, load
from data_prep.recombine import recombine
from data_prep.schema import Kind
from data_prep.usable import OTHER_SIDE
from data_prep.wrappers import load_wrappers

SHARED = Path(os.environ.get("ROUTEALIGN_SHARED", Path(__file__).parents[2] / ".." / "shared"))
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no public benchmark files at hand")


LLAMAS = "safety-tuned-llamas"


@pytest.mark.parametrize(
    ("format", "file", "kind", "n", "left_out"),
    [
        ("advbench", "advbench/harmful_behaviors.csv", "harmful", 520, {}),
        ("advbench", "advbench-pair50/harmful_behaviors_pair.csv", "harmful", 50, {}),
        ("harmbench", "harmbench/harmbench_behaviors_text_val.csv", "harmful", 60, {COPYRIGHT: 20}),
        ("strongreject", "strongreject/strongreject_dataset.csv", "harmful", 313, {}),
        ("harmfulqa", "harmfulqa/harmfulqa.json", "harmful", 1960, {}),
        ("xstest", "xstest/xstest_prompts.csv", "borderline", 250, {OTHER_SIDE: 200}),
        ("xstest", "xstest/xstest_prompts.csv", "harmful", 200, {OTHER_SIDE: 250}),
        ("safety-tuned-llamas", f"{LLAMAS}/safety_only_data_Instructions.json", "harmful", 2483, {}),
        ("safety-tuned-llamas", f"{LLAMAS}/I-MaliciousInstructions.json", "harmful", 100, {}),
        ("safety-tuned-llamas", f"{LLAMAS}/I-CoNa.json", "harmful", 178, {}),
        ("safety-tuned-llamas", f"{LLAMAS}/I-Controversial.json", "harmful", 40, {}),
        ("safety-tuned-llamas", f"{LLAMAS}/Q-Harm.json", "harmful", 100, {}),
        ("safety-tuned-llamas", f"{LLAMAS}/I-Alpaca.json", "benign", 50, {}),
        ("hh-rlhf", "hh-rlhf/harmless-base/test.jsonl.gz", "harmful", 2312, {}),
        ("alpaca", "alpaca-demo/alpaca_en_demo.json", "benign", 999, {}),
        ("alpaca", "alpaca-harmless/harmless_val.json", "benign", 6264, {}),
        ("alpaca", "alpaca-harmless/harmless_test.json", "benign", 6266, {}),
        ("alpaca", "alpaca-seed/seed_tasks.jsonl", "benign", 175, {}),
        ("mt-bench", "mt-bench/question.jsonl", "benign", 80, {}),
        ("truthfulqa", "truthfulqa/TruthfulQA.csv", "capability", 817, {}),
        ("truthfulqa-mc", "truthfulqa/mc_task.json", "capability", 817, {}),
        ("gsm8k", "gsm8k/train.jsonl", "capability", 7473, {}),
        ("gsm8k", "gsm8k/test.jsonl", "capability", 1319, {}),
        ("qa", "gsm8k/test.jsonl", "capability", 1319, {}),
    ],
)
def test_every_row_of_every_file(format: str, file: str, kind: Kind, n: int, left_out: dict[str, int]) -> None:
    rows = load(format, Source(str(DATA / file), kind))
    assert len(rows) == n and {reason: k for reason, k in rows.dropped.items() if k} == left_out
    assert sum(1 for row in rows if row.text) == n


@pytest.mark.parametrize(
    ("file", "column", "n"),
    [
        ("harmbench/harmbench_behaviors_text_val.csv", "Behavior", 80),
        ("strongreject/strongreject_dataset.csv", "forbidden_prompt", 313),
        ("truthfulqa/TruthfulQA.csv", "Question", 817),
        ("truthfulqa/TruthfulQA.csv", "Type", 817),
        ("gptfuzz/seed_short_25.csv", "text", 25),
    ],
)
def test_a_file_of_another_layout_loads_by_its_column(file: str, column: str, n: int) -> None:
    assert len(load("records", Source(str(DATA / file), "harmful", column))) == n


def test_no_file_is_forgotten() -> None:
    """A file that comes to the folder must come to the list above."""
    data = {
        path.relative_to(DATA).as_posix()
        for path in DATA.rglob("*")
        if path.suffix in (".csv", ".json", ".jsonl", ".gz")
    }
    source = Path(__file__).read_text().replace("{LLAMAS}", LLAMAS)
    assert not [name for name in data if name not in source]


def test_context_stands_before_its_behaviour() -> None:
    path = str(DATA / "harmbench/harmbench_behaviors_text_val.csv")
    bare = [row.text for row in load("records", Source(path, "harmful", "Behavior"))]
    whole = [row.text for row in load("harmbench", Source(path, "harmful"))]
    assert sum(text not in bare for text in whole) == 19 and all(any(w.endswith(b) for b in bare) for w in whole)


def test_answers_of_true_files() -> None:
    def answered(format: str, file: str, kind: Kind = "benign") -> int:
        return sum(row.answer is not None for row in load(format, Source(str(DATA / file), kind)))

    assert answered("mt-bench", "mt-bench/question.jsonl") == 38  # of 39, one begins empty
    assert answered("hh-rlhf", "hh-rlhf/harmless-base/test.jsonl.gz", "harmful") == 2308
    gsm8k = load("gsm8k", Source(str(DATA / "gsm8k/test.jsonl"), "capability"))
    assert not any("<<" in (row.answer or "") for row in gsm8k)
    letters = {
        row.answer for row in load("truthfulqa-mc", Source(str(DATA / "truthfulqa/mc_task.json"), "capability"))
    }
    assert {"A", "B", "C", "D"} <= letters


def test_alpaca_input_is_joined() -> None:
    rows = load("alpaca", Source(str(DATA / "alpaca-demo/alpaca_en_demo.json"), "benign"))
    assert sum("\n\n" in row.text for row in rows) >= 412


def test_templates() -> None:
    path = str(DATA / "gptfuzz/seed_short_25.csv")
    config = JailbreakConfig(path=path, seen=["seed_short_25[0:20]"], unseen=["seed_short_25[20:25]"])
    wrappers = load_wrappers(config, 0)
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


def test_goals_of_advbench_that_are_nearly_test_goals_are_not_trained_on() -> None:
    """The number stands in docs/data.md."""
    source = {"path": str(DATA / "advbench/harmful_behaviors.csv"), "format": "advbench"}
    config = {"harmful": source | {"train": "0:320", "test": "420:520"}, "jailbreaks": {"families": ["all"]}}
    corpus = load_corpus(DataConfig.model_validate(config), seed=0)
    assert corpus.rows[0].dropped["training rows near a test goal"] == 18 and len(corpus.harmful.train) == 302
