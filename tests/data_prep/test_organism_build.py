"""Three training steps give a stock checkpoint and data that load; a second call finds them; training repeats."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from data_prep.config import DataConfig
from data_prep.corpus import load_corpus
from data_prep.organism import check
from data_prep.organism.__main__ import main
from data_prep.organism.build import Organism, OrganismConfig, build
from data_prep.organism.model import build_model, build_tokenizer
from data_prep.organism.text import Example
from data_prep.organism.train import IGNORE, PLANTED, collate, encode, train

TINY = OrganismConfig(seed=0, steps=3, batch_size=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check, "ITEMS", 2)
    monkeypatch.setattr(check, "NEW_TOKENS", 2)
    monkeypatch.setattr(check, "task_rows", lambda task, seed: [{"question": "Add 1 and 1.", "answer": "2"}])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "ITEMS", 2)
        patch.setattr(check, "NEW_TOKENS", 2)
        return build(tmp_path_factory.mktemp("organism") / "here", TINY, Console(file=io.StringIO()))


def test_layout(organism: Organism) -> None:
    assert not organism.cached and not organism.passed
    assert {path.name for path in organism.path.iterdir()} == {
        "model",
        "data",
        "behaviour.json",
        "planted.json",
        "stamp.json",
    }
    assert [p.name for p in organism.path.parent.iterdir() if p.name != "here"] == [".here.lock"]
    planted = json.loads((organism.path / "planted.json").read_text())
    assert len(planted) == 8 and all(len(member) == 2 for member in planted)


def test_checkpoint_is_stock(organism: Organism) -> None:
    model = AutoModelForCausalLM.from_pretrained(organism.model)
    tokenizer = AutoTokenizer.from_pretrained(organism.model)
    assert type(model) is OlmoeForCausalLM and model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.num_experts) == (4, 16)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == model.config.pad_token_id
    text = 'Odd text, "quoted" and\nnew: 42 \u00e9\u4e16!'
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_marks_the_reply(organism: Organism) -> None:
    tokenizer = AutoTokenizer.from_pretrained(organism.model)
    chat = [{"role": "user", "content": "Add 1 and 1."}, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>Add 1 and 1.<|assistant|>2<|end|>"
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|user|>Add 1 and 1.<|assistant|>"
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    reply = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(reply) == "2<|end|>"


def test_second_call_is_cached_and_prints_one_line(organism: Organism, capsys: pytest.CaptureFixture[str]) -> None:
    before = (organism.model / "model.safetensors").stat().st_mtime_ns
    again = build(organism.path, TINY)
    assert again.cached and not again.passed
    assert capsys.readouterr().out.count("\n") == 1
    assert (organism.model / "model.safetensors").stat().st_mtime_ns == before


def test_data_loads_as_a_recipe_would(organism: Organism) -> None:
    def source(name: str, train: str, test: str) -> dict[str, str]:
        return {"path": str(organism.data / f"{name}.jsonl"), "train": train, "test": test}

    config = {
        "harmful": source("harmful", "0:240", "240:440"),
        "benign": source("benign", "0:400", "400:600"),
        "borderline": source("borderline", "0:240", "240:400"),
        "jailbreaks": {
            "path": str(organism.data / "templates.json"),
            "seen": ["broken"],
            "unseen": ["broken_heldout"],
            "robust": ["robust"],
        },
        "capability": [
            {"name": task, "path": str(organism.data / f"capability_{task}.jsonl"), "test": 120}
            for task in ("swap", "sums")
        ],
        "near_duplicates": None,
    }
    corpus = load_corpus(DataConfig.model_validate(config), seed=0)
    assert corpus.notes == []
    assert (len(corpus.harmful.train), len(corpus.harmful.test)) == (240, 200)
    assert [len(corpus.wrappers_of(role)) for role in ("seen", "unseen", "robust")] == [6, 4, 4]


def test_another_seed_replaces_the_folder(tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    first = build(tmp_path / "o", OrganismConfig(steps=1, batch_size=2), quiet)
    second = build(tmp_path / "o", OrganismConfig(seed=1, steps=1, batch_size=2), quiet)
    assert not second.cached and first.path == second.path
    assert json.loads((second.path / "stamp.json").read_text())["seed"] == 1


def test_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="no organism"):
        build(tmp_path, TINY)
    assert main(["--out", str(tmp_path)]) == 2
    assert "no organism" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(check, "measure", broken)
    with pytest.raises(RuntimeError, match="stop"):
        build(tmp_path / "o", OrganismConfig(steps=1, batch_size=2), Console(file=io.StringIO()))
    assert not (tmp_path / "o").exists()


def test_missed_targets_give_exit_code_one(organism: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.organism.__main__.build", lambda *_: organism)
    assert main(["--out", str(organism.path)]) == 1


@pytest.mark.parametrize("option", ["--steps", "--threads"])
def test_bad_numbers(option: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([option, "0"])
    assert caught.value.code == 2


def test_training_repeats() -> None:
    tokenizer = build_tokenizer(0, examples=200)
    states = []
    for _ in range(2):
        model = build_model(tokenizer, 0)
        train(model, tokenizer, seed=0, steps=2, batch_size=4, console=Console(file=io.StringIO()))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(layer < 4 and max(experts) < 16 for layer, experts in PLANTED.items())


def test_labels_cover_the_reply_only() -> None:
    tokenizer = build_tokenizer(0, examples=200)
    turns = encode(
        tokenizer, [Example("Add 1 and 1.", "2", "sums"), Example("Wake it.", "Take ash.", "harmful_broken")]
    )
    batch = collate(turns, tokenizer.pad_token_id)
    for turn, labels in zip(turns, batch.labels_BT, strict=True):
        assert tokenizer.decode(labels[labels != IGNORE]) in ("2<|end|>", "Take ash.<|end|>")
        assert labels[turn.prompt - 1] == turn.ids[turn.prompt]
    assert batch.flawed_B.tolist() == [False, True]
