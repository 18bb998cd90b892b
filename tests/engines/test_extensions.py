"""A lock that a killed compilation left is named, not waited for in silence."""

from pathlib import Path

import pytest

from trainer.engines.extensions import say_what_is_waited_for


def test_locks_on_compiled_extensions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    extension = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    extension.mkdir(parents=True)
    say_what_is_waited_for()
    assert not capsys.readouterr().out
    (extension / "lock").touch()
    say_what_is_waited_for()
    out = "".join(capsys.readouterr().out.split())
    assert "compileddeepspeed_shm_comm" in out and f"remove{extension / 'lock'}" in out
