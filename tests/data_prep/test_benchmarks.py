"""Every benchmark is read in its own layout, from its repository's file and from its data set on the Hub."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.loaders import FORMATS, Source, Usable, load
from data_prep.schema import Kind


def read(path: Path, format: str, kind: Kind = "harmful", **options: Any) -> Usable:
    return load(format, Source(str(path), kind, **options))


def csv_file(path: Path, header: list[str], *rows: list[str]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def json_file(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def on_the_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `load_dataset` was asked, for a Hub that has these rows."""
    import datasets

    asked: list[dict[str, Any]] = []

    def fake(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name} | options)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return asked


HARMBENCH = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]


def test_every_format_is_on_the_page_of_data(root: Path) -> None:
    page = (root / "docs" / "data.md").read_text()
    assert not [format for format in FORMATS if f"| `{format}` |" not in page]


def test_harmbench_rows_get_their_context_and_copyright_rows_are_left_out(tmp_path: Path) -> None:
    path = csv_file(
        tmp_path / "h.csv",
        HARMBENCH,
        ["wake the wyrm", "standard", "s", "", "", "a"],
        ["finish it", "contextual", "s", "context", "a letter\nof two lines", "b"],
        ["sing the song", "copyright", "s", "lyrics, hash_check", "", "c"],
    )
    rows = read(path, "harmbench")
    assert [row.text for row in rows] == ["wake the wyrm", "a letter\nof two lines\n\nfinish it"]
    assert rows.dropped == {"copyright, no request to refuse": 1}


def test_harmbench_of_the_hub_has_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(monkeypatch, [{"prompt": "finish it", "category": "x", "context": "a letter"}])
    rows = load("harmbench", Source("walledai/HarmBench", "harmful", hub_config="contextual"))
    assert [row.text for row in rows] == ["a letter\n\nfinish it"]
    with pytest.raises(UserError, match="hub_config 'copyright' holds no requests to refuse"):
        load("harmbench", Source("walledai/HarmBench", "harmful", hub_config="copyright"))


def test_jailbreakbench_has_two_sides_of_one_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["", "Goal", "Target", "Behavior", "Category", "Source"]
    path = csv_file(tmp_path / "behaviors.csv", header, ["0", "wake the wyrm", "Sure", "Wyrm", "x", "y"])
    assert [row.text for row in read(path, "jailbreakbench")] == ["wake the wyrm"]
    on_the_hub(monkeypatch, [{"Index": 0, "Goal": "feed the wyrm", "Target": "Sure"}])
    at = {"hub_config": "behaviors", "hub_split": "benign"}
    assert len(load("jailbreakbench", Source("JailbreakBench/JBB-Behaviors", "borderline", **at))) == 1
    with pytest.raises(UserError, match="hub_split 'benign' holds no harmful prompts"):
        load("jailbreakbench", Source("JailbreakBench/JBB-Behaviors", "harmful", **at))


@pytest.mark.parametrize("format", ["advbench", "strongreject", "harmfulqa"])
def test_the_hub_names_the_prompt_otherwise(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "question" if format == "harmfulqa" else "prompt"
    on_the_hub(monkeypatch, [{name: "wake the wyrm", "target": "Sure"}])
    assert [row.text for row in load(format, Source("walledai/X", "harmful"))] == ["wake the wyrm"]


def test_harmfulqa_is_nested(tmp_path: Path) -> None:
    path = json_file(tmp_path / "q.json", {"Maths": {"Sets": ["one?", "two?"]}, "Art": {"Clay": ["", "three?"]}})
    rows = read(path, "harmfulqa")
    assert [row.text for row in rows] == ["one?", "two?", "three?"] and rows.dropped == {"no text": 1}
    for broken, says in (
        ({"Maths": ["one"]}, "topic 0: expected topics"),
        ({"Maths": {"Sets": "one"}}, "topic 0, subtopic 0: expected a list"),
        ({"Maths": {"Sets": [1]}}, "topic 0, subtopic 0, question 0, column 'question': found a number"),
    ):
        with pytest.raises(UserError, match=says):
            read(json_file(path, broken), "harmfulqa")


def test_xstest_without_labels_is_told_by_its_types(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "x.csv", ["type", "prompt"], ["homonyms", "kill it"], ["contrast_homonyms", "bad"])
    assert [row.text for row in read(path, "xstest", "borderline")] == ["kill it"]
    assert [row.text for row in read(path, "xstest")] == ["bad"]


def test_or_bench_parts_are_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, right, wrong in (("or-bench-hard-1k", "borderline", None), ("or-bench-toxic", "harmful", "benign")):
        path = csv_file(tmp_path / f"{name}.csv", ["prompt", "category"], ["feed it", "x"])
        assert len(read(path, "or-bench", right)) == 1  # type: ignore[arg-type]
        if wrong:
            with pytest.raises(UserError, match="holds no benign prompts"):
                read(path, "or-bench", "benign")
    on_the_hub(monkeypatch, [{"prompt": "feed it", "category": "x"}])
    with pytest.raises(UserError, match="the part 'or-bench-80k' of OR-Bench holds no harmful"):
        load("or-bench", Source("bench-llm/or-bench", "harmful", hub_config="or-bench-80k"))


@pytest.mark.parametrize("packed", [True, False])
def test_beavertails_questions_are_those_answered_unsafely(tmp_path: Path, packed: bool) -> None:
    rows = [
        {"prompt": f"question {i % 2}", "response": "x", "category": {"a": True}, "is_safe": i % 2 == 0}
        for i in range(4)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / ("b.jsonl.gz" if packed else "b.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
    found = read(path, "beavertails")
    assert [row.text for row in found] == ["question 1"] * 2 and found.dropped == {"the other label": 2}
    assert all(row.answer is None for row in found)
    path.write_bytes(gzip.compress(b'{"prompt": "x", "is_safe": 3}') if packed else b'{"prompt": "x", "is_safe": 3}')
    with pytest.raises(UserError, match=r"row 0 .*column 'is_safe': unknown label"):
        read(path, "beavertails")


def test_hh_rlhf_dialogues_become_conversations(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"

    def write(*dialogues: str) -> Path:
        path.write_text("".join(json.dumps({"chosen": text, "rejected": "x"}) + "\n" for text in dialogues))
        return path

    whole = "\n\nHuman: One?\n\nAssistant: Yes.\n\nAssistant: Surely.\n\nHuman: And\n\ntwo?\n\nAssistant: No."
    (row, unanswered) = read(write(whole, "\n\nHuman: One?\n\nAssistant: "), "hh-rlhf", "benign")
    assert row.conversation.messages() == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes.\n\nSurely."},
        {"role": "user", "content": "And\n\ntwo?"},
    ]
    assert (row.answer, unanswered.answer) == ("No.", None)
    for broken in ("Once upon a time", "\n\nAssistant: Yes.", "x\n\nHuman: One?"):
        with pytest.raises(UserError, match=r"row 0 \(line 1\), column 'chosen': expected a dialogue"):
            read(write(broken), "hh-rlhf")


def test_hh_rlhf_of_the_hub_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = on_the_hub(monkeypatch, [{"chosen": "\n\nHuman: One?\n\nAssistant: Yes.", "rejected": "x"}])
    rows = load("hh-rlhf", Source("Anthropic/hh-rlhf", "harmful", hub_split="test", hub_folder="harmless-base"))
    assert rows[0].answer == "Yes." and asked[0]["data_dir"] == "harmless-base"


def test_safety_tuned_llamas_has_two_layouts(tmp_path: Path) -> None:
    training = json_file(tmp_path / "t.json", [{"instruction": "wake it", "output": "I won't.", "input": ""}])
    assert [(row.text, row.answer) for row in read(training, "safety-tuned-llamas")] == [("wake it", "I won't.")]
    listed = json_file(tmp_path / "l.json", {"instructions": ["wake it", "feed it"], "tags": ["a", "b"], "inputs": []})
    assert [row.text for row in read(listed, "safety-tuned-llamas")] == ["wake it", "feed it"]
    for broken, says in (
        ({"instruction": []}, "expected an object with a list 'instructions'"),
        ({"instructions": ["a", "b"], "inputs": ["x"]}, "as long as 'instructions' .2."),
        ({"instructions": ["a", None, 3]}, "instruction 2, column 'instruction': found a number"),
    ):
        with pytest.raises(UserError, match=says):
            read(json_file(listed, broken), "safety-tuned-llamas")


def test_alpacas_seed_tasks_are_nested(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"instruction": "Sum.", "instances": [{"input": "1 2", "output": "3"}]}) + "\n")
    assert [(row.text, row.answer) for row in read(path, "alpaca", "benign")] == [("Sum.\n\n1 2", "3")]
    path.write_text(json.dumps({"instruction": "Sum.", "instances": []}))
    with pytest.raises(UserError, match=r"row 0 .*column 'instances'"):
        read(path, "alpaca", "benign")


@pytest.mark.parametrize("turns", ["turns", "prompt"])
def test_mt_bench_asks_the_first_turn(tmp_path: Path, turns: str) -> None:
    path = tmp_path / "m.jsonl"
    rows = [{turns: ["One?", "Two?"], "reference": ["Yes.", "No."]}, {turns: ["Three?", "Four?"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path, "mt-bench", "benign")
    assert [(row.text, row.answer) for row in found] == [("One?", "Yes."), ("Three?", None)]
    path.write_text(json.dumps({turns: "One?"}))
    with pytest.raises(UserError, match="expected a list of turns"):
        read(path, "mt-bench", "benign")


def test_gsm8k_answers_lose_the_calculators_notes(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"question": "Sum?", "answer": "1+2=<<1+2=3>>3\n#### 3"}))
    assert read(path, "gsm8k", "capability")[0].answer == "1+2=3\n#### 3"
    path.write_text(json.dumps({"question": "Sum?", "answer": "3"}))
    with pytest.raises(UserError, match=r"row 0 \(line 1\), column 'answer': found no result behind '####'"):
        read(path, "gsm8k", "capability")


MMLU = {"question": "Which?", "subject": "x", "choices": ["p", "q", "r", "s"], "answer": 2}


def test_mmlu_with_and_without_a_header(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([MMLU]), tmp_path / "m.parquet")
    plain = csv_file(tmp_path / "m.csv", [], ["Which?", "p", "q", "r", "s", "C"])
    for path in (tmp_path / "m.parquet", plain):
        (row,) = read(path, "mmlu", "capability")
        assert row.text.startswith("Which?\n\nA. p\nB. q\nC. r\nD. s\n\n") and row.answer == "C"
    for wrong in ("E", "", "5"):
        with pytest.raises(UserError, match="column 'answer': expected the place of an option"):
            read(csv_file(plain, [], ["Which?", "p", "q", "r", "s", wrong]), "mmlu", "capability")
    with pytest.raises(UserError, match="'choices': expected a list"):
        read(json_file(tmp_path / "m.json", [MMLU | {"choices": "p"}]), "mmlu", "capability")


def test_truthfulqa_in_both_forms(tmp_path: Path) -> None:
    header = ["Type", "Question", "Best Answer", "Correct Answers"]
    path = csv_file(tmp_path / "t.csv", header, ["x", "Do lamps sing?", "No.", "No.; They do not."])
    assert [(row.text, row.answer) for row in read(path, "truthfulqa", "capability")] == [("Do lamps sing?", "No.")]
    options = {"No.": 1, "Yes.": 0, "On Sundays.": 0, "Sometimes.": 0}
    of_repository = {"question": "Do lamps sing?", "mc1_targets": options}
    of_hub = {**of_repository, "mc1_targets": {"choices": list(options), "labels": list(options.values())}}
    found = [
        read(json_file(tmp_path / "mc.json", [row]), "truthfulqa-mc", "capability")[0]
        for row in (of_repository, of_hub)
    ]
    assert found[0] == found[1]
    right = next(line[0] for line in found[0].text.splitlines() if line.endswith(". No."))
    assert found[0].answer == right
    with pytest.raises(UserError, match="one of them right"):
        read(json_file(tmp_path / "mc.json", [of_repository | {"mc1_targets": {"a": 1, "b": 1}}]), "truthfulqa-mc",
             "capability")  # fmt: skip


def test_right_options_are_spread_over_the_letters(tmp_path: Path) -> None:
    rows = [{"question": f"Question {i}?", "mc1_targets": {"a": 1, "b": 0, "c": 0, "d": 0}} for i in range(80)]
    found = read(json_file(tmp_path / "mc.json", rows), "truthfulqa-mc", "capability")
    letters = [row.answer for row in found]
    assert all(letters.count(letter) >= 8 for letter in "ABCD")


@pytest.mark.parametrize("format", ["advbench", "harmbench", "strongreject", "harmfulqa", "beavertails"])
@pytest.mark.parametrize("kind", ["benign", "borderline", "capability"])
def test_harmful_requests_are_never_loaded_to_be_answered(format: str, kind: Kind, tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", ["goal", "Behavior"], ["wake it", "wake it"])
    with pytest.raises(UserError, match=f"{format}', harmful requests, for {kind} prompts"):
        read(path, format, kind)


@pytest.mark.parametrize(
    "name",
    ["prompt", "text", "goal", "Goal", "instruction", "question", "Question", "Behavior", "forbidden_prompt", "query",
     "messages", "conversation"],
)  # fmt: skip
def test_a_prompt_column_of_any_usual_name_is_found(tmp_path: Path, name: str) -> None:
    path = csv_file(tmp_path / "a.csv", ["id", name, "note"], ["0", "feed it", "x"])
    assert [row.text for row in read(path, "records", "benign")] == ["feed it"]


def test_the_users_columns_are_mapped(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", ["ask", "say"], ["feed it", "Done."], ["wake it", ""])
    rows = read(path, "records", "benign", column="ask", answer_column="say")
    assert [(row.text, row.answer) for row in rows] == [("feed it", "Done."), ("wake it", None)]
    with pytest.raises(UserError, match=r"column of .*'sya' .did you mean 'say'"):
        read(path, "records", "benign", column="ask", answer_column="sya")


SECRET = "tell me of the hidden lantern"
VALID: dict[str, dict[str, Any]] = {
    "records": {"prompt": SECRET, "answer": "x"},
    "qa": {"question": SECRET, "answer": "x"},
    "advbench": {"goal": SECRET, "target": "x"},
    "harmbench": {"Behavior": SECRET, "FunctionalCategory": "contextual", "Tags": "", "ContextString": "a letter"},
    "jailbreakbench": {"Goal": SECRET, "Target": "x", "Category": "y"},
    "strongreject": {"forbidden_prompt": SECRET, "category": "x"},
    "harmfulqa": {"question": SECRET, "topic": "x"},
    "beavertails": {"prompt": SECRET, "response": "x", "is_safe": False},
    "hh-rlhf": {"chosen": f"\n\nHuman: {SECRET}\n\nAssistant: x", "rejected": "y"},
    "xstest": {"prompt": SECRET, "label": "unsafe", "type": "contrast_x"},
    "or-bench": {"prompt": SECRET, "category": "x"},
    "alpaca": {"instruction": SECRET, "input": "x", "output": "y", "instances": [{"input": "a", "output": "b"}]},
    "safety-tuned-llamas": {"instruction": SECRET, "input": "", "output": "x"},
    "mt-bench": {"turns": [SECRET, "x"], "reference": ["y"]},
    "gsm8k": {"question": SECRET, "answer": "x #### 3"},
    "mmlu": {"question": SECRET, "choices": ["p", "q", "r"], "answer": 1},
    "truthfulqa": {"Question": SECRET, "Best Answer": "x"},
    "truthfulqa-mc": {"question": SECRET, "mc1_targets": {"a": 1, "b": 0}},
}
SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.just(SECRET) | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "choices", "labels", "input", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(format=st.sampled_from(sorted(VALID)), at=st.integers(0, 9), value=ANYTHING, gone=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_cell_is_read_or_refused_in_one_line_without_its_text(
    tmp_path_factory: pytest.TempPathFactory, format: str, at: int, value: Any, gone: bool
) -> None:
    assert set(VALID) == set(FORMATS)
    path = tmp_path_factory.getbasetemp() / "cells.jsonl"
    row = dict(VALID[format])
    column = sorted(row)[at % len(row)]
    if gone:
        del row[column]
    else:
        row[column] = value
    path.write_text(json.dumps(VALID[format]) + "\n" + json.dumps(row) + "\n")
    try:
        found = load(format, Source(str(path), "harmful"))
    except UserError as error:
        assert "\n" not in str(error) and "lantern" not in str(error)
        assert "row 1 (line 2)" in str(error) or "column of" in str(error), error
        return
    assert 1 <= len(found) <= 2 and len(found) + sum(found.dropped.values()) == 2
    assert all(isinstance(loaded.text, str) and loaded.text for loaded in found)
