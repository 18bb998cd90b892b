"""Several processes end with the code they were given, whatever the libraries leave behind."""

from pathlib import Path

from tests.distributed.launching import start


def test_processes_leave_together_and_without_the_interpreters_teardown(tmp_path: Path) -> None:
    ended = start("ddp", tmp_path, "tests.distributed.leaving", tmp_path, "0")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("last words") == 2
    assert {path.name for path in tmp_path.iterdir()} >= {"late", "left-0", "left-1"}


def test_a_code_other_than_0_waits_for_nobody(tmp_path: Path) -> None:
    ended = start("ddp", tmp_path, "tests.distributed.leaving", tmp_path, "3")
    assert "exitcode  : 3" in ended.stderr and "SIGABRT" not in ended.stderr
