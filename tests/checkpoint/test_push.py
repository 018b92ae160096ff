# SPDX-License-Identifier: Apache-2.0
"""``growkit push`` against a stand-in of the Hub's API on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from huggingface_hub import constants

from growkit.cli.main import main


class StandIn(ThreadingHTTPServer):
    """What the Hub was asked and what it was given; weights go the way of LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[3:5]).split("?")[0]
        if "/tree/" in self.path:
            branch = self.path.split("/tree/")[1].split("?")[0]
            files = self.server.files.get(branch, {})
            self.answer(
                [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
            )
        elif self.path.startswith("/api/models/") and name in self.server.repos:
            files = self.server.files.get("main", {})
            self.answer({"id": name, "siblings": [{"rfilename": path} for path in files]})
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        data = self.body()
        if self.server.refuse:
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.server.repos[name] = asked
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/branch/" in self.path:
            self.server.files[self.path.rsplit("/", 1)[1]] = {}
            self.answer({})
        elif "/preupload/" in self.path:
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(data)["files"]
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        one
                        | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                        for one in json.loads(data)["objects"]
                    ],
                }
            )
        elif "/commit/" in self.path:
            self.commit(self.path.split("/commit/")[1].split("?")[0], data)
        else:
            self.answer({"error": self.path}, 404)

    def commit(self, branch: str, data: bytes) -> None:
        files = self.server.files.setdefault(branch, {})
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.answer(
            {
                "success": True,
                "commitOid": "c" * 40,
                "commitUrl": f"{self.server.url}/org/tiny/commit/{'c' * 40}",
            }
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny.make_folder(tmp_path / "run", tiny.llama_config(), "BF16")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# run\n")
    (folder / "LICENSE").write_text("MIT\n")
    (folder / "training" / "checkpoints").mkdir(parents=True)
    (folder / "training" / "metrics.jsonl").write_text("{}\n")
    (folder / "optimizer.pt").write_bytes(b"moments")
    return folder


def test_a_folder_goes_up_as_one_commit(
    hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(folder), "org/tiny", "--private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["commit"] == "c" * 40 and told["url"].endswith("/org/tiny")
    asked = hub.repos["org/tiny"]  # versions of huggingface_hub say it in two ways
    assert asked.get("private") is True or asked.get("visibility") == "private"
    names = {"README.md", "LICENSE", "config.json", "model.safetensors"}
    assert set(told["files"]) == names
    given = hub.files["main"]
    assert {name: given[name] for name in names} == {n: (folder / n).read_bytes() for n in names}
    # Weights that the folder does not have any more go with the next commit.
    given["model-00001-of-00002.safetensors"] = b"old"
    assert main(["push", str(folder), "org/tiny", "--quiet"]) == 0
    assert "model-00001-of-00002.safetensors" not in given and names <= given.keys()


def test_a_branch_is_made(hub: StandIn, folder: Path) -> None:
    assert main(["push", str(folder), "org/tiny", "--revision", "step-4", "-q"]) == 0
    assert "config.json" in hub.files["step-4"] and not hub.files.get("main")


def test_a_dry_run_sends_nothing(
    hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(folder), "org/tiny", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would push 4 files" in shown and "optimizer.pt" not in shown
    assert hub.repos == {} and hub.files == {}


def test_what_is_refused(
    hub: StandIn, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, why in (
        ([str(folder), "a/b/c"], "is no name on the Hub"),
        ([str(tmp_path / "none"), "org/tiny"], "There is no folder"),
        ([str(folder), "org/tiny", "--optimizer-state"], "has no growkit_optimizer/"),
    ):
        assert main(["push", *arguments]) == 2
        assert why in capsys.readouterr().err
    hub.refuse = True
    assert main(["push", str(folder), "org/tiny"]) == 1
    refused = capsys.readouterr().err
    assert "The Hub did not take 'org/tiny'" in refused and "hf auth login" in refused
    hub.refuse = False
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    assert main(["push", str(folder), "org/tiny"]) == 1
    assert hub.repos == {}
