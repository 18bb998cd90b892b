"""A server that speaks as much of the Hub's HTTP API as a push needs, and keeps what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Spoiled = tuple[int, bytes, dict[str, str]] | None
"""(status, body, headers) of an answer as no Hub gives it; None: no answer."""

TOKEN = "hf_" + "x1" * 17


class Hub:
    """One user, `user`. `files`: repository -> path -> content, as committed.

    `spoiled`: end of a path -> the answer to every request for it.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken_uploads = False
        self.spoiled: dict[str, Spoiled] = {}
        self.closing = threading.Event()
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request."""
        self.requests.append(f"{method} {path}")
        if path.startswith("/large/"):  # the address is signed; real storage gets no token either
            if self.broken_uploads or hashlib.sha256(body).hexdigest() != path.removeprefix("/large/"):
                return 403, {}
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        content = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            return self._create(f"{content['organization']}/{content['name']}", content.get("visibility") == "private")
        repo = "/".join(path.removeprefix("/api/models").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if repo not in self.files:
            return 404, {"error": "Repository not found"}
        if path == f"/api/models/{repo}":
            return 200, {"id": repo, "private": self.private[repo], "siblings": []}
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in content["files"]
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.address}/large/{o['oid']}"}},
                }
                for o in content["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no such address: {path}"}

    def _create(self, repo: str, private: bool) -> tuple[int, Any]:
        if not repo.startswith("user/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if repo in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repo}"}
        self.files[repo], self.private[repo] = {}, private
        return 200, {"url": f"{self.address}/{repo}"}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large[value["oid"]]
        return 200, {
            "success": True,
            "commitUrl": f"{self.address}/{repo}/commit/{'c' * 40}",
            "commitOid": "c" * 40,
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.address`, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            path = self.path.partition("?")[0]
            for end, spoiled in hub.spoiled.items():
                if path.endswith(end):
                    self._body()
                    hub.requests.append(f"{self.command} {path}")
                    return self._spoiled(spoiled)
            status, content = hub.answer(
                self.command, self.path.partition("?")[0], self.headers.get("Authorization", ""), self._body()
            )
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status == 404 and "not found" in str(content):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(text)

        def _spoiled(self, answer: Spoiled) -> None:
            if answer is None:
                hub.closing.wait()
                return
            status, text, headers = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = respond

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
