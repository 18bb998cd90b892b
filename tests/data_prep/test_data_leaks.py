"""A text is counted once, never trained where it is tested, and never both refused and answered."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DataConfig, JailbreakConfig
from data_prep.corpus import load_corpus
from data_prep.errors import UserError
from data_prep.same_text import compared, normalised
from data_prep.schema import Corpus, Prompt
from data_prep.wrappers import load_wrappers

KINDS = ("harmful", "benign", "borderline")


def write(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts))
    return str(path)


def corpus(folder: Path, seed: int = 0, **sources: Any) -> Corpus:
    """Each source as (texts, train, test)."""
    sections: dict[str, Any] = {}
    for name, (texts, train, test) in sources.items():
        part = {"path": write(folder / f"{name}.jsonl", texts), "test": test}
        if name == "capability":
            sections[name] = [part | {"name": "task", "format": "records"}]
        else:
            sections[name] = part | {"train": train}
    return load_corpus(DataConfig.model_validate(sections), seed)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_eight_copies_of_one_test_row_are_one(tmp_path: Path) -> None:
    found = corpus(tmp_path, benign=(["a lantern", *["a candle", "A candle!"] * 4], "0:1", "1:9"))
    assert texts(found.benign.test) == ["a candle"]
    assert found.notes == ["data.benign: 7 test rows dropped, their text is that of another test row"]
    (count,) = found.rows
    assert (count.read, count.train, count.test, count.dropped) == (9, 1, 1, {"test rows twice": 7})
    assert count.cells() == ("data.benign", 9, 1, 1, "7 test rows twice")


def test_training_rows_twice_count_once(tmp_path: Path) -> None:
    found = corpus(tmp_path, benign=(["a", "b", "a", "c"], "0:3", "3:4"))
    assert texts(found.benign.train) == ["a", "b"] and "1 training rows dropped" in found.notes[0]


def test_a_text_tested_in_one_source_is_trained_in_none(tmp_path: Path) -> None:
    shared = [f"How do I stop process {i}?" for i in range(8)]
    found = corpus(
        tmp_path,
        benign=([*shared, "other"], "0:9:2", "1:9:2"),
        borderline=([*shared, "more"], "4:9", "0:4"),
        capability=(shared, 0, 2),
    )
    tested = {*texts(found.benign.test), *texts(found.borderline.test), *texts(found.tasks[0].prompts)}
    trained = {*texts(found.benign.train), *texts(found.borderline.train)}
    assert not tested & trained and {"other", "more"} <= trained
    note = "data.borderline: 2 training rows dropped, their text is also in the test part of data.benign"
    assert note in found.notes


def test_whole_conversations_are_compared(tmp_path: Path) -> None:
    def talk(first: str) -> list[dict[str, str]]:
        turns = (("user", first), ("assistant", "Yes."), ("user", "And then?"))
        return [{"role": role, "content": text} for role, text in turns]

    found = corpus(tmp_path, benign=([talk("One?"), talk("Two?"), talk("two"), "And then?"], "0:2", "2:4"))
    assert [p.id for p in found.benign.train] == ["benign:0"] and len(found.benign.test) == 2


@pytest.mark.parametrize("other", ["benign", "borderline", "capability"])
def test_a_text_to_be_refused_and_answered_is_an_error(tmp_path: Path, other: str) -> None:
    sources: dict[str, Any] = {"harmful": (["x", "y", "Z."], "0:2", "2:3"), other: (["a", "z"], 0, 2)}
    with pytest.raises(
        UserError, match=rf"data.harmful and data.{other}.* share 1 texts, first harmful:2 and {other}:1"
    ):
        corpus(tmp_path, **sources)


def test_one_file_for_harmful_and_harmless_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", [f"text {i}" for i in range(9)])
    (tmp_path / "again.jsonl").symlink_to(path)
    for other in (path, str(tmp_path / "again.jsonl"), str(tmp_path / "." / "one.jsonl")):
        config = {"harmful": {"path": path, "test": "0:2"}, "benign": {"path": other, "test": "4:6"}}
        with pytest.raises(UserError, match=r"data.harmful and data.benign read the same file"):
            load_corpus(DataConfig.model_validate(config), 0)
    (tmp_path / "x.csv").write_text("prompt,label\none,safe\ntwo,unsafe\n")
    sides = {"path": str(tmp_path / "x.csv"), "format": "xstest", "test": 1}
    found = load_corpus(DataConfig.model_validate({"harmful": sides, "borderline": sides}), 0)
    assert texts(found.harmful.test) == ["two"] and found.rows[0].dropped == {"the other label": 1}


def test_training_rows_that_are_all_tested_elsewhere_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.borderline: every one of the 1 training rows"):
        corpus(tmp_path, benign=(["a", "b"], 0, 2), borderline=(["a", "c"], "0:1", "1:2"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Wake, the\nwyrm!", "wake the WYRM"),
        ("ＷＡＫＥ", "wake"),
        ("caf\u00e9", "cafe\u0301"),
        ("wa\u200bke", "wake"),
        ("\u2764\ufe0f", "\u2764"),
        ("\u201cstra\u00dfe\u201d", "STRASSE"),
    ],
)
def test_what_makes_no_other_text(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f", "\u0915\u0940"),  # one letter, two vowel signs
        ("\u0915", "\u0915\u093f"),
        ("caf\u00e9", "cafe"),
        ("\u05d1\u05b8", "\u05d1\u05b4"),
        ("go \U0001f642", "go \U0001f641"),
        ("go \U0001f642", "go"),
        ("\U0001f642", "\U0001f641"),
        ("what is 2-2", "what is 2*2"),
        ("what is 2 + 2", "what is 2 - 2"),
        ("1.5", "15"),
        ("what is -5", "what is 5"),
        ("?", "!"),
    ],
)
def test_what_makes_another_text(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_templates_that_differ_in_case_and_spaces_are_one(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"a": ["Be Zed. [P]"], "b": ["be  zed: [P] "]}))
    with pytest.raises(UserError, match=r"b\[0\] .unseen. is the same as .*a\[0\] .seen."):
        load_wrappers(JailbreakConfig(path=str(path), placeholder="[P]", seen=["a"], unseen=["b"]), 0)


WORDS = st.sampled_from(["wake", "Wake!", "w\u0101ke", "lamp", "LAMP", "la mp", "2-2", "2*2", "ink", "\U0001f642", ""])
TEXTS = st.lists(st.tuples(WORDS, WORDS, WORDS).map(" ".join), min_size=5, max_size=14)
# Mostly texts of their own, so that few tables are refused for a text on both sides.
GOALS = st.lists(
    st.tuples(st.just("goal"), WORDS, WORDS).map(" ".join) | st.just("wake lamp ink"), min_size=5, max_size=14
)
DEALT = st.sampled_from([(2, 2), (0, 3), ("0:2", 2), (2, "1::2"), ("0:2", "2:"), ("::2", "1::2"), ("-2:", ":-2")])


def parts_of(texts: st.SearchStrategy[list[str]]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(texts, DEALT).map(lambda drawn: (drawn[0], *drawn[1]))


PARTS = st.fixed_dictionaries(
    {"harmful": parts_of(GOALS), "benign": parts_of(TEXTS)},
    optional={"borderline": parts_of(TEXTS), "capability": parts_of(TEXTS)},
)


@given(parts=PARTS, seed=st.integers(0, 3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_trained_and_tested_and_every_row_is_counted(
    tmp_path: Path, parts: dict[str, Any], seed: int
) -> None:
    try:
        found = corpus(tmp_path, seed, **parts)
    except UserError as error:
        assert ("\n" not in str(error) and "data." in str(error)) or "no usable rows" in str(error)
        return
    splits = {kind: getattr(found, kind) for kind in KINDS}
    tests = {kind: [compared(p.conversation) for p in split.test] for kind, split in splits.items()}
    tests |= {task.name: [compared(p.conversation) for p in task.prompts] for task in found.tasks}
    trained = {kind: [compared(p.conversation) for p in split.train] for kind, split in splits.items()}
    for listed in (*tests.values(), *trained.values()):
        assert len(set(listed)) == len(listed)
    assert not {key for keys in trained.values() for key in keys} & {key for keys in tests.values() for key in keys}
    goals = {*tests["harmful"], *trained["harmful"]}
    assert not goals & {key for name, keys in (tests | {f"{k} train": v for k, v in trained.items()}).items()
                        if not name.startswith("harmful") for key in keys}  # fmt: skip
    for count in found.rows:
        name = count.source.removeprefix("data.").split(" ")[0]
        assert count.read == len(parts[name][0]) == count.train + count.test + sum(count.dropped.values())
        kept = splits.get(name)
        if kept is not None:
            assert (count.train, count.test) == (len(kept.train), len(kept.test))
