"""What the tests of the methods share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.cli.app import main


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, expect exit code 2 and exactly one line `error: ...` on stderr; returns that line."""

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("error: ")

    return run
