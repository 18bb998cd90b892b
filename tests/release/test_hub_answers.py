"""A Hub that refuses, answers nonsense or does not answer ends in one line."""

import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from data_prep.errors import UserError
from tests.release.finished_run import finished, hub, run
from tests.release.hub_server import TOKEN, Hub, Spoiled
from trainer.cli.app import main
from trainer.pipeline import push as pushing
from trainer.pipeline.push import push
from trainer.runtime import hub_client

__all__ = ["finished", "hub", "run"]


def test_what_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str, **options: bool) -> str:
        with pytest.raises(UserError) as error:
            push(finished, repo, **options)
        line = str(error.value)
        assert "\n" not in line and TOKEN not in line
        return line

    assert "may not write there" in refused("somebody/safer")
    hub.broken_uploads = True
    assert "may not write there" in refused("user/safer")
    assert hub.files["user/safer"] == {}
    hub.broken_uploads = False
    hub.private["user/safer"] = False
    assert "exists and is public" in refused("user/safer", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    assert "does not know you" in refused("user/safer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in refused("user/safer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused("user/safer")


HTML = b"<html><body>Sign in to the network</body></html>"
NO_JSON: dict[str, tuple[str, tuple[int, bytes, dict[str, str]]]] = {
    "create: exists, without an address": ("/repos/create", (409, b'{"error": "exists"}', {})),
    "create: a page": ("/repos/create", (200, HTML, {"Content-Type": "text/html"})),
    "create: a page in JSON": ("/repos/create", (200, b'"<html>"', {})),
    "create: a list": ("/repos/create", (200, b"[1]", {})),
    "create: nothing": ("/repos/create", (200, b"", {})),
    "create: null": ("/repos/create", (200, b"null", {})),
    "create: no address": ("/repos/create", (200, b'{"url": 7}', {})),
    "create: bytes": ("/repos/create", (200, b"\xff\xfe\x00", {})),
    "create: deep": ("/repos/create", (200, b"[" * 10**5, {})),
    "create: cut": ("/repos/create", (200, b'{"url"', {"Content-Length": "900"})),
    "create: away": ("/repos/create", (307, b"", {"Location": "http://["})),
    "create: round": ("/repos/create", (307, b"", {"Location": "/api/repos/create"})),
    "create: broken": ("/repos/create", (500, HTML, {})),
    "create: later": ("/repos/create", (429, b"", {"Retry-After": "86400"})),
    "files: a page": ("/preupload/main", (200, HTML, {})),
    "files: a list": ("/preupload/main", (200, b"[]", {})),
    "files: others": ("/preupload/main", (200, b'{"files": [{"path": "x"}]}', {})),
    "files: none": ("/preupload/main", (200, b'{"files": []}', {})),
    "files: later": ("/preupload/main", (503, b"", {"Retry-After": "86400"})),
    "large: a page": ("/objects/batch", (200, HTML, {})),
    "large: a list": ("/objects/batch", (200, b"[]", {})),
    "large: none": ("/objects/batch", (200, b'{"objects": [{}]}', {})),
    "commit: a page": ("/commit/main", (200, HTML, {})),
    "commit: a list": ("/commit/main", (200, b"[]", {})),
    "commit: empty": ("/commit/main", (200, b"{}", {})),
    "commit: numbers": ("/commit/main", (200, b'{"commitUrl": 1, "commitOid": 2}', {})),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_an_answer_that_no_hub_gives_is_one_line(
    case: str, hub: Hub, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    end, answer = NO_JSON[case]
    hub.spoiled[end] = answer
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(finished), "--repo", "user/safer"])
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: user/safer: ")]) == 1
    assert hub.files.get("user/safer", {}) == {} and TOKEN not in err


@pytest.mark.parametrize("end", ["/repos/create", "/preupload/main", "/commit/main", "/api/models/user/safer"])
def test_a_hub_that_never_answers_is_given_up(
    end: str, hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    hub.spoiled[end] = None
    started = time.monotonic()
    with pytest.raises(UserError, match=r"user/safer: the Hub cannot be reached or refused"):
        push(finished, "user/safer", private=True)
    assert time.monotonic() - started < 8
    assert len([request for request in hub.requests if request.endswith(end)]) == 1


def test_a_hub_that_is_busy_for_ever_is_given_up(hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    text = b"Cannot create repo: another conflicting operation is in progress"
    hub.spoiled["/repos/create"] = (409, text, {})
    with pytest.raises(UserError, match="busy with another operation of yours"):
        push(finished, "user/safer")


def test_a_file_that_changes_on_the_way_is_not_sent(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*given: Any, **more: Any) -> Any:
        uploads = gather(*given, **more)
        (run / "model/config.json").write_text("{}")
        return uploads

    gather = pushing.gather
    monkeypatch.setattr(pushing, "gather", swapped)
    with pytest.raises(UserError, match=r"config\.json: changed while it was being pushed"):
        push(run, "user/safer")
    assert hub.requests == []


@pytest.mark.parametrize("endpoint", ["", "huggingface", "ftp://host", "http://[", "http://host:99999999/x y"])
def test_an_address_of_the_hub_that_is_none_is_refused_by_name(
    endpoint: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match=r"HF_ENDPOINT: found '.*', allowed: https://host"):
        push(finished, "user/safer")


@pytest.mark.parametrize(
    "answer", [None, (200, HTML, {}), (200, b"[]", {}), (200, b"{}", {}), (200, b"[" * 10**5, {})]
)
def test_a_base_on_a_hub_that_gives_no_answer_is_refused_in_one_line(
    answer: Spoiled,
    hub: Hub,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.spoiled["/owner/name/revision/main"] = hub.spoiled["/owner/name"] = answer
    with pytest.raises(SystemExit) as stopped:
        main(["apply", "owner/name", str(finished), "--out", str(tmp_path / "out")])
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err and not (tmp_path / "out").exists()
    assert len([line for line in err.splitlines() if line.startswith("error: owner/name: ")]) == 1
