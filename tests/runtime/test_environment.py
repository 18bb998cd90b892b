"""What a launcher puts into the environment is checked before anything reads it."""

import time

import pytest

from data_prep.errors import UserError
from trainer.cli.app import main
from trainer.runtime.processes import check_environment
from trainer.runtime.signals import time_limit


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"RANK": "x"}, "RANK: found 'x'"),
        ({"RANK": "-1"}, "RANK: found '-1'"),
        ({"RANK": ""}, "RANK: found ''"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK: found '1.5'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: found"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: found 2 in the environment, expected less than WORLD_SIZE=2"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "x"}, "HF_HUB_DOWNLOAD_TIMEOUT: found 'x'"),
        ({"WORLD_SIZE": "2"}, "RANK: not in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not in the environment"),
    ],
)
def test_a_launchers_variable_that_cannot_be_is_one_line(
    settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words[:40]):
        check_environment()
    with pytest.raises(SystemExit) as left:
        main(["run", "none.yaml"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1 and words in err


def test_a_time_limit_breaks_off_what_does_not_end() -> None:
    with pytest.raises(UserError, match="never"), time_limit(0.05, UserError("never")):
        while True:
            pass
    with time_limit(0.05, UserError("never")):
        pass
    start = time.process_time()
    while time.process_time() < start + 0.1:
        pass
