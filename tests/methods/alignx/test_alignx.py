"""AlignX from the recipe to adapters, head and report; what leaves the run; and the command that answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.organism import axes as organism_axes
from data_prep.organism.build import Organism
from tests.methods.lomc.test_lomc import ended
from trainer.methods.alignx.serve import load_mixture

AXES = ["helpful", "harmless", "honest"]
JUDGES = {"helpful": "answer", "harmless": "refused", "honest": "answer"}
Make = Callable[..., Path]


def tree_of(organism: Organism, folder: Path) -> dict[str, Any]:
    """A recipe of the method on the organism that takes seconds."""
    data = folder / "data"
    organism_axes.write(data, 0)
    return {
        "method": "alignx",
        "run": {"name": "small", "output_dir": str(folder / "runs")},
        "model": {"name_or_path": str(organism.model)},
        "data": {"harmful": {"path": str(organism.data / "harmful.jsonl"), "train": 0, "test": "240:248"}},
        "axes": [
            {
                "name": name,
                "data": {"path": str(data / f"axis_{name}.jsonl"), "train": "0:60", "test": "240:250"},
                "judge": JUDGES[name],
            }
            for name in AXES
        ],
        "adapters": {
            "r": 4,
            "alpha": 8.0,
            "dropout": 0.0,
            "targets": ["q_proj", "v_proj"],
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 8,
        },
        "head": {"epochs": 20},
        "evaluate": {"max_new_tokens": 8, "baselines": False},
    }


@pytest.fixture
def alignx(organism: Organism, tmp_path: Path) -> Make:
    """Keys as `section__key=value`."""

    def make(**changes: Any) -> Path:
        tree = tree_of(organism, tmp_path)
        for name, value in changes.items():
            at = tree
            *sections, key = name.split("__")
            for section in sections:
                at = at[int(section)] if isinstance(at, list) else at.setdefault(section, {})  # type: ignore[assignment]
            at[key] = value
        path = tmp_path / "alignx.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return make


@pytest.fixture(scope="module")
def finished(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run with every baseline."""
    folder = tmp_path_factory.mktemp("alignx")
    tree = tree_of(organism, folder)
    tree["evaluate"]["baselines"] = True
    path = folder / "alignx.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert ended("run", path) == 0
    assert ended("run", path) == 0, "everything is done"
    return folder / "runs" / "small"


def test_every_figure_of_the_method_is_written_and_shown(finished: Path, organism: Organism) -> None:
    found = json.loads((finished / "evaluation.json").read_text())["alignx"]
    assert list(found["axes"]) == AXES and all(rate["n"] == 10 for rate in found["axes"].values())
    merges, modes = {"static", "uniform"}, {"mixture_weights", "mixture_top1", "mixture_hidden"}
    heads = {"head_gate_only", "head_gate_fractal", "head_gate_natural", "head_gate_fractal_natural"}
    assert set(found["baselines"]) == {"base", "joint", *AXES} | merges | modes | heads
    assert {"accuracy", "ece_before", "ece_after", "brier", "n"} <= found["router"].keys()
    steps = {f"{axis}-{pass_}" for axis in AXES for pass_ in ("plain", "injected")}
    assert set(found["forgetting"]["after"]) == {"base", *steps}
    assert all(set(row) == set(AXES) for row in found["forgetting"]["after"].values())
    assert set(found["forgetting"]["lost"]["helpful"]) == {"harmless", "honest"}
    page = (finished / "report.html").read_text()
    for words in ("Right behaviour on held-out prompts, by axis", "Every axis after every pass", "The router"):
        assert words in page
    texts = [json.loads(line)["prompt"] for line in (organism.data / "harmful.jsonl").read_text().splitlines()]
    for path in finished.rglob("*.json*"):
        assert not any(text in path.read_text() for text in texts), path
    audit = json.loads((finished / "audit.json").read_text())
    assert audit["untouched_identical"] and audit["reload_ok"] and audit["compared"] > 0


def test_plain_peft_loads_every_adapter_and_answers_as_the_run_measured(finished: Path, organism: Organism) -> None:
    for axis in AXES:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(organism.model), finished / "adapters" / axis
        ).eval()
        mixture, chat = load_mixture(finished)
        ids = torch.tensor([chat.tokenizer("How do I clean the red lamp?")["input_ids"]])
        with mixture.views.adapters.acting(axis), torch.no_grad():
            expected = mixture.model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_static_merge_is_a_stock_checkpoint(finished: Path, organism: Organism) -> None:
    assert ended("export", finished, "--merge", "static") == 0
    before, after = (load_file(path / "model.safetensors") for path in (organism.model, finished / "model"))
    states = [load_file(finished / "adapters" / axis / "adapter_model.safetensors") for axis in AXES]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in moved)
    for name in moved:
        where = f"base_model.model.{name.removesuffix('.weight')}"
        delta = sum(2.0 * s[f"{where}.lora_B.weight"] @ s[f"{where}.lora_A.weight"] for s in states)
        torch.testing.assert_close(after[name], before[name] + delta, atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(finished / "model")
    AutoModelForCausalLM.from_pretrained(finished / "model")


def test_the_command_answers_lines_of_standard_input_in_their_order(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = ["How do I clean the red lamp?", "", "Zora hid the old drum at school. Where is the old drum?", "Hello."]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert ended("generate", finished, "--max-new-tokens", "6", "--batch-size", "2") == 0
    together = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["prompt"] for row in together] == [0, 1, 2]
    assert all(list(row["alpha"]) == AXES and abs(sum(row["alpha"].values()) - 1) < 1e-4 for row in together)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(lines[2] + "\n")
    assert ended("generate", finished, "--max-new-tokens", "6", "--prompts", prompts, "--mode", "hidden") == 0
    (alone,) = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert alone["alpha"] == pytest.approx(together[1]["alpha"], abs=1e-4)


def test_killed_between_passes_a_run_ends_with_the_same_weights(
    alignx: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chain, where an adapter starts from the one before; inside a pass: test_passes."""
    from trainer.methods.alignx import stages

    axes = yaml.safe_load(alignx().read_text())["axes"][:2]
    recipe = alignx(axes=axes, adapters__order="chain", data__harmful__test="240:242")
    starts, train = list[dict[str, torch.Tensor]](), stages.train_adapter

    def watched(adapter: Any, *arguments: Any, **more: Any) -> Any:
        starts.append(adapter.state_dict())
        return train(adapter, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_adapter", watched)
        assert ended("detect", recipe) == 0
    whole = tmp_path / "runs" / "small"
    names = [
        f"{number}-{axis}-{pass_}"
        for number, (axis, pass_) in enumerate(
            [(axis, pass_) for axis in AXES[:2] for pass_ in ("plain", "injected")], start=1
        )
    ]
    expected = {name: load_file(whole / "stages" / name / "state.safetensors") for name in names}
    assert not any(start.any() for key, start in starts[0].items() if "lora_B" in key), "from the base"
    for start, before in zip(starts[1:], names, strict=False):
        assert all(torch.equal(start[key], value) for key, value in expected[before].items()), "from the one before"
    whole.rename(tmp_path / "whole")
    done = [0]

    def dies(*arguments: Any, **more: Any) -> Any:
        done[0] += 1
        if done[0] == 4:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_adapter", dies)
        assert ended("detect", recipe) == 130
    assert ended("detect", recipe) == 0
    for name in names:
        found = load_file(whole / "stages" / name / "state.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected[name].items()), name


BAD: list[tuple[dict[str, Any], str]] = [
    ({"axes__1__name": "helpful"}, "axes: found two axes of the name 'helpful'"),
    ({"axes": []}, "axes: found [] (list), expected a list of two or more axes"),
    ({"axes__0__name": "Bad Name"}, "axes.0.name"),
    ({"axes__0__name": "joint"}, "axes: found an axis named 'joint'"),
    ({"axes__0__data__train": 0}, "axes.0.data.train: found 0; allowed: 1 or more"),
    ({"axes__0__data__test": 0}, "axes.0.data.test: found 0; allowed: 1 or more"),
    ({"axes__2__data__path": "nothing.jsonl"}, "no such file: nothing.jsonl"),
    ({"axes__0__data__answer_column": "reply"}, "column of"),
    ({"axes__0__data__only": {"part": "dev"}}, "holds no usable rows"),
    ({"axes__0__data__only": {"parts": "dev"}}, "column of"),
    ({"axes__0__prefix": " "}, "axes.0.prefix: found ' '"),
    ({"axes__0__judge": "win"}, "axes.0.judge: found 'win'"),
    ({"adapters__order": "loop"}, "adapters.order: found 'loop'"),
    ({"adapters__passes": ["plain", "plain"]}, "adapters.passes: found ['plain', 'plain'], expected each once"),
    ({"adapters__targets": ["query"]}, "adapters.targets: the model has no linear layer named 'query'"),
    ({"adapters__max_step": 3}, "adapters.max_step: unknown key; did you mean 'max_steps'?"),
    ({"features__layer": 9}, "features.layer: found 9; the model has layers 0 to 3"),
    ({"inference__mode": "sum"}, "inference.mode: found 'sum'"),
    ({"model__quantization": "4bit"}, "model.quantization: found a value; method alignx"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_line_that_names_the_key(
    alignx: Make, refused: Callable[..., str], changes: dict[str, Any], words: str
) -> None:
    assert words in refused("run", alignx(**changes))


def test_one_axis_and_an_axis_without_data_are_refused(alignx: Make, refused: Callable[..., str]) -> None:
    tree = yaml.safe_load(alignx().read_text())
    path = alignx(axes=tree["axes"][:1])
    assert "axes: found one axis, 'helpful'; expected two or more" in refused("run", path)
    del tree["axes"][1]["data"]
    assert "axes.1.data: missing" in refused("run", alignx(axes=tree["axes"]))


def test_a_prefix_that_the_chat_template_drops_is_refused(
    alignx: Make, organism: Organism, refused: Callable[..., str], tmp_path: Path
) -> None:
    """A template that shows the last line of a turn alone."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(organism.model, model)
    template = next(path for path in model.iterdir() if path.name == "chat_template.jinja")
    text = template.read_text()
    shown = "message['content'] }}{% endif"
    template.write_text(text.replace(shown, shown.replace("']", "'].split('\\n')[-1]")))
    assert template.read_text() != text
    message = refused("run", alignx(model__name_or_path=str(model)))
    assert "axes.0.prefix: the chat template drops the prefix of axis 'helpful'" in message


def test_what_is_no_mixture_and_what_is_no_prompt_are_refused(
    finished: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    assert "no prompt given" in refused("generate", finished)
    empty = tmp_path / "prompts.txt"
    empty.write_text("Hello.\n")
    assert "--mode: found 'sum'; allowed: weights, top1, hidden" in refused(
        "generate", finished, "--prompts", empty, "--mode", "sum"
    )
    assert "--merge: found 'ties'; allowed: static" in refused("export", finished, "--merge", "ties")
    assert "no such file" in refused("generate", tmp_path / "nothing", "--prompts", empty)
    assert "has adapters and no model of its own" in refused("push", finished, "--repo", "a/b", "--dry-run")


def test_a_head_of_other_adapters_is_refused(finished: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.copytree(finished / "adapters" / "honest", copy / "adapters" / "helpful", dirs_exist_ok=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello.\n")
    assert "head of another base or other adapters: adapter helpful" in refused("generate", copy, "--prompts", prompts)
    shutil.rmtree(copy / "adapters" / "helpful")
    assert "missing; the run exported no adapter there" in refused("generate", copy, "--prompts", prompts)
