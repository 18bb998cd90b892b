"""Mistakes a user can make: one line on stderr, exit code 2, and every finished stage is kept."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.organism.build import Organism
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.moe.expert_set import ExpertSet, Member

Small = Callable[..., Path]
Refused = Callable[..., str]


def test_a_model_that_refuses_nothing_gives_no_pair_and_says_how_many(
    small: Small, refused: Refused, organism: Organism, tmp_path: Path
) -> None:
    # Harmless prompts that nothing else in the recipe reads.
    path = tmp_path / "harmless.jsonl"
    path.write_text("\n".join((organism.data / "benign.jsonl").read_text().splitlines()[-200:]))
    harmless = {"data__benign__train": "0:24", "data__benign__test": "24:32"}
    message = refused("run", small(data__harmful__path=str(path), **harmless))
    assert "no pair survives: the model refuses 0 of 24 plain harmful goals (data.harmful)" in message


def test_jailbreaks_that_do_not_work_give_no_pair_and_say_how_many(small: Small, refused: Refused) -> None:
    recipe = small(data__jailbreaks__seen=["robust"], data__jailbreaks__robust=[], detect__recombined=0.0)
    message = refused("run", recipe)
    assert "no pair survives: 0 of 96 jailbroken goals were answered (24 of 24 plain goals are refused)" in message


@pytest.mark.parametrize("top_k", [64, 1000])
def test_more_experts_than_the_model_has_are_refused_before_anything_runs(
    small: Small, refused: Refused, top_k: int, tmp_path: Path
) -> None:
    message = refused("run", small(detect__top_k=top_k))
    assert f"detect.top_k: {top_k} selects {top_k} experts; allowed: 1 to 63" in message
    assert not (tmp_path / "runs/small/pairs.jsonl").exists()


def test_a_dense_model_is_refused_with_its_type(small: Small, refused: Refused, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    message = refused("run", small(model__name_or_path=str(tmp_path / "dense")))
    assert "model type 'llama' is dense: no router and no experts module found" in message
    assert "model type 'llama'" in refused("inspect", tmp_path / "dense")


def test_a_tokenizer_without_a_chat_template_is_refused(small: Small, refused: Refused, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    assert "has no chat template" in refused("run", small(model__name_or_path=str(tmp_path / "plain")))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "x" * 5000])
def test_a_model_that_is_nowhere_is_refused_by_its_key(small: Small, refused: Refused, name: str) -> None:
    assert f"model.name_or_path: '{name}' is no folder here and no Hub id" in refused(
        "run", small(model__name_or_path=name)
    )


def test_a_revision_is_refused_where_it_would_change_nothing(small: Small, refused: Refused) -> None:
    message = refused("run", small(model__revision="v1"))
    assert "model.revision: found 'v1' with the local folder" in message and "allowed: with a Hub id" in message
    assert "model.revision: found an empty text" in refused(
        "run", small(model__name_or_path="a/b", model__revision="")
    )


def test_a_missing_data_file_an_empty_one_and_a_missing_column_are_refused(
    small: Small, refused: Refused, tmp_path: Path
) -> None:
    assert "nowhere.jsonl" in refused("run", small(data__benign__path=str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused("run", small(data__benign__path=str(tmp_path / "empty.jsonl")))
    (tmp_path / "other.jsonl").write_text('{"promt": "w1"}\n' * 40)
    message = refused("run", small(data__benign__path=str(tmp_path / "other.jsonl"), data__benign__column="prompt"))
    assert "other.jsonl" in message and "promt" in message


def test_rows_that_are_no_prompts_are_refused_with_file_row_and_column(
    small: Small, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"prompt": "w1"}\n{"prompt": {"role": "user"}}\n')
    message = refused("run", small(data__benign__path=str(tmp_path / "odd.jsonl")))
    assert (
        "odd.jsonl, row 1 (line 2), column 'prompt': found an object, expected text or a list of messages" in message
    )
    (tmp_path / "odd.csv").write_text("prompt\nhow, then\n")
    assert "row 0 (line 2): found 2 cells" in refused("run", small(data__benign__path=str(tmp_path / "odd.csv")))
    assert "data.harmful.test: found 0" in refused("run", small(data__harmful__test=0))
    assert "data.jailbreaks.seen: found no selector" in refused("run", small(data__jailbreaks__seen=[]))
    assert "evaluate.refusal_markers: found 'e'" in refused("run", small(evaluate__refusal_markers=["e"]))


def test_a_misspelt_key_and_a_wrong_type_are_refused(small: Small, refused: Refused) -> None:
    assert "did you mean 'learning_rate'" in refused("run", small(repair__learning_rat=1.0))
    message = refused("run", small(detect__max_pairs="many"))
    assert "detect.max_pairs" in message and "many" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repair__router_aux_loss_coef": 0.01}, "router_aux_loss_coef"),
        ({"repair__gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"consistency__gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"repair__output_dir": "x"}, "output_dir"),
    ],
)
def test_settings_that_would_break_the_method_are_refused(
    small: Small, refused: Refused, changes: dict[str, object], message: str
) -> None:
    assert message in refused("run", small(**changes))


def test_a_diverging_run_stops_and_keeps_what_was_good(small: Small, refused: Refused, tmp_path: Path) -> None:
    recipe = small(repair__learning_rate=1e30, repair__max_grad_norm=0.0, repair__warmup_steps=0, repair__max_steps=20)
    message = refused("run", recipe)
    assert "repair: loss is" in message and "stopped" in message and "repair.learning_rate" in message
    stages = json.loads((tmp_path / "runs/small/manifest.json").read_text())["stages"]
    assert stages["detect"]["status"] == stages["evaluate-before"]["status"] == "finished"
    assert stages["repair-1"]["status"] == "started"


def test_the_folder_of_another_recipe_is_refused_and_left_alone(
    small: Small, refused: Refused, tmp_path: Path
) -> None:
    refused("run", small(repair__learning_rate=1e30, repair__max_grad_norm=0.0, repair__warmup_steps=0))
    before = (tmp_path / "runs/small/manifest.json").read_bytes()
    assert "model.dtype" in refused("run", small(model__dtype="bfloat16"))
    assert (tmp_path / "runs/small/manifest.json").read_bytes() == before


GOOD_SET = ExpertSet((Member(0, 1),), dict.fromkeys(range(3), 8)).to_json()
NO_SET = ExpertSet((), dict.fromkeys(range(3), 8)).to_json()


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (NO_SET, ["--prompt=w1"], "any.json: names no expert; expected at least one to activate or deactivate"),
        (None, ["--prompt=w1"], "any.json: cannot be read (No such file or directory); expected steering.json"),
        (GOOD_SET, ["--prompt=w1", "--strength=nan"], "--strength: found nan; allowed: 0 (untouched) to 1 (forced)"),
        (GOOD_SET, ["--prompt=w1", "--strength=-1"], "--strength: found -1.0"),
        (GOOD_SET, ["--prompt=w1", "--max-new-tokens=0"], "--max-new-tokens: found 0; allowed: 1 or more"),
        (GOOD_SET, ["--prompt=w1", "--max-new-tokens=9999999"], "--max-new-tokens: 1 of 1 prompts leave no room"),
        (GOOD_SET, ["--prompt=w1", "--prompt= "], "--prompt: found an empty text"),
        (GOOD_SET, [], "no prompt given"),
        (GOOD_SET, ["--prompts=bytes.txt"], "--prompts: bytes.txt: cannot be read as a text file"),
        (GOOD_SET, ["--prompts=none.txt"], "--prompts: none.txt: cannot be read as a text file"),
        (GOOD_SET, ["--prompts=empty.txt"], "empty.txt: holds no prompts"),
    ],
)
def test_what_steer_cannot_do_is_refused_by_its_option_or_file(
    experts: str | None,
    options: list[str],
    message: str,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    Path("empty.txt").write_text("")
    if experts is not None:
        Path("any.json").write_text(experts)
    assert message in refused("steer", "model", "--experts", "any.json", *options)


def test_a_full_disk_while_saving_is_one_line_and_loses_no_finished_stage(small: Small, tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the same system call fails in the same place."""
    recipe, limit = small(), 200_000  # activations fit, the repaired experts do not

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "trainer", "run", str(recipe)]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, preexec_fn=limited)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1 and "File too large" in errors[0] and "state.safetensors" in errors[0]
    assert "Traceback" not in ended.stderr
    stages = json.loads((tmp_path / "runs/small/manifest.json").read_text())["stages"]
    assert stages["detect"]["status"] == "finished"
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "detect: done before, kept" in again.stdout


def test_no_slip_over_a_finished_run_costs_any_of_it(
    small: Small, refused: Refused, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused by the recipe, by a library, by the model, or while a stage runs: the good recipe goes on as before."""
    recipe, folder = small(), tmp_path / "runs/small"

    def run() -> str:
        with pytest.raises(SystemExit) as left:
            main(["run", str(recipe)])
        assert left.value.code == 0
        return capfd.readouterr().out

    run()
    wrong = {
        "repair.weight_decay=.inf": "repair.weight_decay: found inf",
        "repair.lr_scheduler_kwargs={nonsense: 1}": "repair: found ",
        "detect.top_k=1000": "detect.top_k: 1000 selects 1000 experts",
        "detect.max_new_tokens=5000": "detect.max_new_tokens: found 5000",
        "evaluate.refusal_markers=[zzzz]": "no pair survives",
        "repair.learning_rate=1e30": "repair: loss is",
    }
    files = ("manifest.json", "recipe.yaml", "evaluation.json", "audit.json", "model/model.safetensors")
    before = {name: (folder / name).read_bytes() for name in files}
    for override, words in wrong.items():
        more = ["repair.max_grad_norm=0", "repair.warmup_steps=0"] if "learning_rate" in override else []
        assert words in refused("run", recipe, override, *more)
        assert {name: (folder / name).read_bytes() for name in files} == before, override
    out = run()
    assert "runs again" not in out and "repair-1: done before, kept" in out
