"""Hub ids as sources: a cache built by hand, no network, and what the Hub may answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
from huggingface_hub import constants

from growkit.checkpoint.hub import origin, resolve_source
from growkit.cli.main import main
from growkit.core.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "f" * 40


def add_snapshot(cache: Path, commit: str, config: tiny.Config) -> None:
    """One revision of org/tiny in the Hub's own layout: links into a folder of blobs."""
    repo = cache / "models--org--tiny"
    folder = tiny.make_folder(cache / f"made-{commit[:4]}", config, "BF16", shards=2)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: other/one\n---\n# tiny\n")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = repo / "blobs" / f"{commit[:4]}-{file.name}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    folder.rmdir()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "hub"
    config = tiny.llama_config(hidden_size=32, head_dim=8)
    add_snapshot(cache, COMMIT, config)
    add_snapshot(cache, OLD, config | {"num_hidden_layers": 1})
    refs = cache / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (refs / "v0").write_text(OLD)
    return cache


@pytest.fixture
def offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """huggingface_hub reads its environment at import; this is what it would have read."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    return cache


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process and an environment of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "growkit", *arguments],
        cwd=folder,
        env=inherited | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_command_takes_a_hub_id(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]["layer"]["size"] == 2
    assert main(["plan", "org/tiny", "--layers", "+1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]["layer"]["after"] == 3
    assert main(["grow", "org/tiny", "--query-heads", "x2", "--out", "grown", "-q"]) == 0
    assert main(["verify", "org/tiny", "grown", "--tokens", "64", "-q"]) == 0
    assert main(["diff", "org/tiny", "grown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["as_grown"] is True
    manifest = json.loads(Path("grown/growkit.json").read_text())
    assert manifest["parent"]["name"] == "org/tiny"
    assert manifest["parent"]["revision"] == COMMIT
    assert manifest["verification"]["a"] == "org/tiny"
    card = Path("grown/README.md").read_text()
    assert "license: mit" in card and "base_model:\n- org/tiny\n" in card
    assert "Grown from `org/tiny`" in card
    copied = Path("grown/generation_config.json")
    assert copied.is_file() and not copied.is_symlink()
    # The grown weights are those of the snapshot grown as a local folder.
    snapshot = offline / "models--org--tiny" / "snapshots" / COMMIT
    assert main(["grow", str(snapshot), "--query-heads", "x2", "-o", "b", "-q"]) == 0
    weights = [Path(f, "model.safetensors").read_bytes() for f in ("grown", "b")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("revision", ["v0", OLD])
def test_a_revision_is_a_tag_or_a_commit(
    offline: Path, revision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "org/tiny", "--revision", revision, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]["layer"]["size"] == 1


def test_a_folder_wins_over_the_hub(offline: Path) -> None:
    tiny.make_folder(Path("org/tiny"), tiny.llama_config(num_hidden_layers=3))
    assert resolve_source(Path("org/tiny")) == Path("org/tiny")
    with pytest.raises(UsageError, match="no Hub id"):
        resolve_source(Path("org/tiny"), "main")


def test_names_of_folders_and_snapshots(offline: Path, tmp_path: Path) -> None:
    assert origin(resolve_source(Path("org/tiny"))) == ("org/tiny", COMMIT)
    assert origin(tmp_path) == (tmp_path.name, None)


@pytest.mark.parametrize("name", ["./org/tiny", "/org/tiny", "a/b/c", "tiny", "..", "org/.."])
def test_what_cannot_be_a_hub_id_stays_a_folder(name: str) -> None:
    path = Path(name) if name != "./org/tiny" else Path("../org/tiny")
    assert resolve_source(path) == path


def test_offline_by_the_environment(cache: Path, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    result = run(["plan", "org/tiny", "--layers", "+1", "--json"], tmp_path, **offline)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["axes"]["layer"]["before"] == 2
    for missing in (["org/other"], ["org/tiny", "--revision", "v9"]):
        result = run(["plan", *missing, "--layers", "+1"], tmp_path, **offline)
        assert result.returncode == 1
        assert "HF_HUB_OFFLINE is set" in result.stderr
        assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 2


def test_without_a_network_the_cache_serves(cache: Path, tmp_path: Path) -> None:
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(cache)}
    result = run(["plan", "org/tiny", "--layers", "+1", "--json"], tmp_path, **unreachable)
    assert result.returncode == 0, result.stderr
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tinier").mkdir()
    result = run(["plan", "org/tinyer", "--layers", "+1"], tmp_path, **unreachable)
    assert result.returncode == 1
    assert "the Hub cannot be reached" in result.stderr
    assert "Did you mean 'tinier'?" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@pytest.fixture
def hub() -> Iterator[str]:
    """A Hub that knows one gated model, one model without revisions, and nothing else."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kinds = {"gated": (403, "GatedRepo"), "known": (404, "RevisionNotFound")}
            found = [kind for name, kind in kinds.items() if name in self.path]
            status, code = found[0] if found else (404, "RepoNotFound")
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["org/none"], 2, "neither a folder here nor a model that the Hub shows you"),
        (["org/gated"], 1, "is gated"),
        (["org/known", "--revision", "v7"], 2, "has no revision 'v7'"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    tmp_path: Path, hub: str, arguments: list[str], code: int, sentence: str
) -> None:
    result = run(["inspect", *arguments], tmp_path, HF_ENDPOINT=hub)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 2


def test_a_local_folder_needs_no_hub_library(tmp_path: Path) -> None:
    tiny.make_folder(tmp_path / "a", tiny.llama_config())
    script = (
        "import sys; from growkit.cli.main import main; "
        "assert main(['plan', 'a', '--layers', '+1', '-q']) == 0; "
        "assert main(['--help']) == 0; "
        "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
