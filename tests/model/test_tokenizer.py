"""A tokenizer and its chat template are tried before anything is asked of the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import UserError
from tests.tiny import tiny_model, tiny_tokenizer
from trainer.cli.app import main
from trainer.model import tokenizer as under_test
from trainer.model.tokenizer import check_template, read_tokenizer
from trainer.recipe.sections import ModelSection


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint with one file replaced; None removes it."""

    def make(name: str, content: str | bytes | None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in plain.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return make


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tokenizer(ModelSection(name_or_path=str(folder)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


SHOWS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m. }}{% endfor %}", "cannot be rendered"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% if messages|length > 1 %}{{ raise_exception('only users') }}{% endif %}" + SHOWS, "only users"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "cannot be rendered"),
        ("hello", "leaves out what is asked"),
        ("{{ messages[0].content }}", "leaves out what is answered"),
        ("", "leaves out what is asked"),
    ],
)
def test_a_chat_template_that_does_not_work_is_refused(template: str, words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"model\.name_or_path: the chat template of 'm' ") as caught:
        check_template(tokenizer, "m")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_chat_template_that_never_ends_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "SECONDS", 0.3)
    tokenizer = tiny_tokenizer()
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loops + SHOWS
    with pytest.raises(UserError, match="did not end within"):
        check_template(tokenizer, "m")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", None),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_tokenizer_files_that_cannot_be_read_are_refused(
    changed: Callable[..., Path], name: str, content: str | bytes | None
) -> None:
    assert "tokenizer" in refused(changed(name, content))


def test_a_model_that_is_not_in_the_cache_is_refused_by_its_key() -> None:
    assert "model.name_or_path: 'some/model' is no folder here and is not to be had" in refused(Path("some/model"))


def test_a_folder_without_a_model_and_a_file_are_refused_by_key(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_inspect_needs_no_tokenizer_and_says_that_a_run_does(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = changed(name, None)
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder), "--json"])
    out, err = capsys.readouterr()
    assert left.value.code == 0 and json.loads(out)["model_type"] == "olmoe"
    assert [line for line in err.splitlines() if line.startswith("caution: ")]


@pytest.mark.parametrize("cut", [1, 4000, None])
def test_inspect_refuses_a_weight_file_that_was_cut_by_its_name(
    changed: Callable[..., Path], plain: Path, capsys: pytest.CaptureFixture[str], cut: int | None
) -> None:
    whole = (plain / "model.safetensors").read_bytes()
    folder = changed("model.safetensors", whole[:-cut] if cut else b"\xff" * 64)
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and "model.safetensors" in line
