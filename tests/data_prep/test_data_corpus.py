"""Splits share nothing, counts are seeded, and every way to ask for the impossible is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_prep.config import DataConfig, JailbreakConfig, SourceConfig, TaskConfig
from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.same_text import normalised
from data_prep.schema import Conversation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("harmful", "benign", "borderline"):
        lines = (json.dumps({"prompt": f"{name} request number {i}"}) for i in range(20))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "qa.jsonl").write_text(
        "\n".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(9))
    )
    groups = {
        "broken": [f"wrapper {i}: [INSERT PROMPT HERE]" for i in range(4)],
        "robust": ["[INSERT PROMPT HERE] ok"],
    }
    (tmp_path / "templates.json").write_text(json.dumps(groups))
    return tmp_path


def config(folder: Path, **changes: Any) -> DataConfig:
    sections: dict[str, Any] = {
        name: {"path": str(folder / f"{name}.jsonl"), "train": 8, "test": 6}
        for name in ("harmful", "benign", "borderline")
    }
    sections["jailbreaks"] = {
        "path": str(folder / "templates.json"),
        "seen": ["broken[0:2]"],
        "unseen": ["broken[2]", "broken[-1]"],
        "robust": ["robust"],
    }
    sections["near_duplicates"] = None  # the texts above differ in a number
    sections["capability"] = [{"name": "qa", "path": str(folder / "qa.jsonl"), "test": 5}]
    for key, value in changes.items():
        sections[key] = sections[key] | value if isinstance(sections[key], dict) else value
    return DataConfig.model_validate(sections)


def test_whole_corpus(folder: Path) -> None:
    corpus = load_corpus(config(folder), seed=0)
    assert (len(corpus.harmful.train), len(corpus.harmful.test)) == (8, 6)
    assert {p.kind for p in corpus.borderline.test} == {"borderline"}
    assert [w.family for w in corpus.wrappers_of("unseen")] == ["broken[2]", "broken[3]"]
    assert [w.role for w in corpus.wrappers] == ["seen", "seen", "unseen", "unseen", "robust"]
    assert corpus.wrappers[0].wrap(Conversation.of("GOAL")).text == "wrapper 0: GOAL"
    assert corpus.tasks[0].prompts[0].answer is not None and len(corpus.tasks[0].prompts) == 5
    assert corpus.notes == []


def test_counts_are_seeded_and_disjoint(folder: Path) -> None:
    one, again, other = (load_corpus(config(folder), seed) for seed in (0, 0, 1))
    assert one == again
    assert one.harmful != other.harmful
    assert not {p.id for p in one.harmful.train} & {p.id for p in one.harmful.test}


def test_ids_are_rows_of_the_file(folder: Path) -> None:
    corpus = load_corpus(config(folder, harmful={"train": "0:3", "test": "1::6"} | {"train": "2:6"}), seed=0)
    assert [p.id for p in corpus.harmful.train] == [f"harmful:{i}" for i in range(2, 6)]
    assert [p.id for p in corpus.harmful.test] == [f"harmful:{i}" for i in (1, 7, 13, 19)]
    assert corpus.harmful.test[1].text == "harmful request number 7"


def test_count_draws_from_what_a_slice_leaves(folder: Path) -> None:
    corpus = load_corpus(config(folder, harmful={"train": 10, "test": "0:10"}), seed=3)
    assert {int(p.id.split(":")[1]) for p in corpus.harmful.train} == set(range(10, 20))


def test_same_text_is_dropped_from_train_and_noted(folder: Path) -> None:
    rows = ["Alpha one", "beta", "gamma", "alpha,  ONE!", "delta"]
    (folder / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in rows))
    corpus = load_corpus(config(folder, harmful={"train": "0:3", "test": "3:5"}), seed=0)
    assert [p.text for p in corpus.harmful.train] == ["beta", "gamma"]
    assert corpus.notes == ["data.harmful: 1 training rows dropped, their text is also in test"]


def test_test_path(folder: Path) -> None:
    other = folder / "more_goals.jsonl"
    other.write_text("\n".join(json.dumps({"prompt": f"another goal {i}"}) for i in range(20)))
    corpus = load_corpus(config(folder, harmful={"train": 20, "test": 20, "test_path": str(other)}), seed=0)
    assert {p.id.split(":")[0] for p in corpus.harmful.test} == {"more_goals"}


def test_test_path_with_the_same_stem_has_distinct_ids(folder: Path) -> None:
    (folder / "more").mkdir()
    other = folder / "more" / "harmful.jsonl"
    other.write_text(json.dumps({"prompt": "new"}))
    corpus = load_corpus(config(folder, harmful={"test": 1, "test_path": str(other)}), seed=0)
    assert corpus.harmful.test[0].id == "more/harmful:0"


def test_normalised() -> None:
    assert normalised("  Wake, the\nWYRM! ") == "wake the wyrm"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"harmful": {"train": 15}}, r"data.harmful.train .*15 rows asked, 14 of 20"),
        ({"harmful": {"train": 0, "test": 21}}, r"data.harmful.test .*21 rows asked, 20 of 20"),
        ({"benign": {"test": "0:21"}}, "slice '0:21' exceeds the 20"),
        ({"benign": {"test": "5:5"}}, "is empty"),
        ({"harmful": {"train": "0:10", "test": "9:12"}}, "overlap in 1 rows of .*first 9"),
        ({"harmful": {"path": "nowhere.csv"}}, "no such file: nowhere.csv"),
        ({"harmful": {"column": "promt"}}, "did you mean 'prompt'"),
        ({"jailbreaks": {"seen": ["brokn"]}}, "'brokn' .did you mean 'broken'"),
        ({"jailbreaks": {"seen": ["broken[9]"]}}, "outside group 'broken', which has 4"),
        ({"jailbreaks": {"seen": ["broken[0:9]"]}}, "exceeds group 'broken'"),
        ({"jailbreaks": {"seen": ["broken[2:2]"]}}, "selects no template"),
        ({"jailbreaks": {"seen": ["broken[x]"]}}, "expected a count or a slice"),
        ({"jailbreaks": {"seen": ["broken]["]}}, "no selector"),
        ({"jailbreaks": {"seen": ["broken"]}}, r"broken\[2\] .unseen. is the same as .*seen"),
        ({"jailbreaks": {"placeholder": "{goal}"}}, r"has no placeholder '\{goal\}'"),
        ({"jailbreaks": {"path": "nowhere.json"}}, "no such file"),
        ({"capability": [{"name": "a", "path": "nowhere.json"}]}, "no such file"),
        ({"harmful": {"path": "x" * 5000 + ".csv"}}, "no such file: xxx"),
        ({"harmful": {"revision": "v1"}}, r"^data.harmful, revision: found 'v1' with the local file .*Hub data set"),
        ({"benign": {"hub_split": "test"}}, r"^data.benign, hub_split: found 'test' with the local file"),
        ({"benign": {"hub_folder": "part"}}, r"^data.benign, hub_folder: found 'part' with the local file"),
        ({"benign": {"answer_column": "nsewer"}}, r"column of .*'nsewer'"),
        ({"harmful": {"train": 10, "test": 0}}, r"^data.harmful.test: found 0; allowed: 1 or more"),
        ({"benign": {"train": 0, "test": 0}}, r"^data.benign.test: found 0"),
        ({"capability": [{"name": "a", "path": "q.json", "test": 0}]}, r"^data.capability 'a', test: found 0"),
        ({"harmful": {"train": "0:12:9999999"}}, r"^data.harmful.train .*'0:12:9999999' has a step beyond its rows"),
        ({"harmful": {"test": "-21:"}}, r"^data.harmful.test .*exceeds the 20"),
        ({"harmful": {"train": 10**9}}, r"^data.harmful.train .*1000000000 rows asked"),
        ({"jailbreaks": {"seen": []}}, r"^data.jailbreaks.seen: found no selector"),
        ({"jailbreaks": {"seen": [], "unseen": [], "robust": []}}, r"^data.jailbreaks.seen: found no selector"),
        ({"jailbreaks": {"seen": [], "unseen": []}}, r"^data.jailbreaks.seen: found no selector"),
    ],
)
def test_impossible_requests(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_corpus(config(folder, **changes), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            {"a": ["x" * 100_001]},
            "group a, template 0, column 'text': found 100001 characters; allowed: at most 100000",
        ),
        ({"a": ["fine [INSERT PROMPT HERE]", None]}, "group a, template 1: found NoneType, expected text"),
        ({"a": "text"}, "group a: must be a list"),
        ({"x" * 61: ["text"]}, "group 0: a group's name has 1 to 60"),
        ({"a]": ["text"]}, "group 0: a group's name"),
        ({"a": []}, "holds no templates"),
    ],
)
def test_templates_that_are_none_are_refused_with_their_place(folder: Path, groups: object, says: str) -> None:
    (folder / "templates.json").write_text(json.dumps(groups))
    with pytest.raises(UserError) as caught:
        load_corpus(config(folder), seed=0)
    assert str(caught.value).startswith(str(folder / "templates.json")) and says in str(caught.value)


def test_a_group_twice_is_refused(folder: Path) -> None:
    (folder / "templates.json").write_text('{"broken": ["x"], "broken": ["y"]}')
    with pytest.raises(UserError, match=r"templates\.json: not valid JSON: an object has one key twice"):
        load_corpus(config(folder), seed=0)


def test_everything_dropped_is_an_error(folder: Path) -> None:
    (folder / "harmful.jsonl").write_text('{"prompt": "one"}\n{"prompt": "One."}')
    with pytest.raises(UserError, match="every one of the 1 training rows"):
        load_corpus(config(folder, harmful={"train": "0:1", "test": "1:2"}), seed=0)


def test_same_text_under_two_roles(folder: Path) -> None:
    groups = {"a": ["x [INSERT PROMPT HERE]"], "b": ["x  [INSERT PROMPT HERE]"]}
    (folder / "templates.json").write_text(json.dumps(groups))
    with pytest.raises(UserError, match="one role"):
        load_corpus(config(folder, jailbreaks={"seen": ["a"], "unseen": ["b"], "robust": []}), seed=0)


def test_tasks_need_answers_and_distinct_names(folder: Path) -> None:
    (folder / "bare.jsonl").write_text('{"prompt": "x"}')
    bare = {"name": "bare", "path": str(folder / "bare.jsonl"), "format": "records", "test": 1}
    with pytest.raises(UserError, match="row 0 has no answer"):
        load_corpus(config(folder, capability=[bare]), seed=0)
    qa = {"name": "qa", "path": str(folder / "qa.jsonl"), "test": 1}
    with pytest.raises(UserError, match="more than once"):
        load_corpus(config(folder, capability=[qa, qa]), seed=0)


def test_templates_of_a_table(folder: Path) -> None:
    path = folder / "short.csv"
    path.write_bytes(b'text\r\n"first\r\n[INSERT PROMPT HERE]"\r\nsecond [INSERT PROMPT HERE]\r\n')
    corpus = load_corpus(
        config(folder, jailbreaks={"path": str(path), "seen": ["short[0]"], "unseen": [], "robust": []}), 0
    )
    assert [w.id for w in corpus.wrappers] == ["short:short[0]"]
    grouped = folder / "grouped.jsonl"
    grouped.write_text('{"group": "g", "text": "[INSERT PROMPT HERE]"}')
    jailbreaks = {"path": str(grouped), "seen": ["g"], "unseen": [], "robust": []}
    assert load_corpus(config(folder, jailbreaks=jailbreaks), 0).wrappers[0].family == "g[0]"


@pytest.mark.parametrize(
    "fields",
    [
        {"train": "0-3"},
        {"train": -1},
        {"test": "::0"},
        {"fromat": "qa"},
        {"format": "nothing"},
        {"train": True},
        {"test": 1.5},
        {"train": "-:3"},
        {"train": "0:" + "9" * 5000},
        {"test": "\u0663:4"},
        {"path": ""},
        {"test_path": ""},
    ],
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig.model_validate({"path": "a.csv"} | fields)


def test_every_field_is_documented() -> None:
    for section in (SourceConfig, JailbreakConfig, TaskConfig, DataConfig):
        assert all(field.description for field in section.model_fields.values())
