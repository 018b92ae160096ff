"""Links of a folder are followed inside it and nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import copy_side_files, open_checkpoint
from growkit.checkpoint.links import inside
from growkit.cli.main import main
from growkit.core.errors import CheckpointError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text('{"password": "hunter2"}')
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "source", tiny.llama_config())


SIDE_FILES = [
    "LICENSE", "NOTICE.txt", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "merges.txt", "generation_config.json", "extra.json", "README.md", "growkit.json",
    "tokenizer.model", "additional_chat_templates/x.jinja", "modeling_x.py", "optimizer.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_link_out_of_the_folder_is_refused_by_name(
    source: Path, secret: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret)
    arguments = ["grow", str(source), "--layers", "+1", "--no-verify", "--out"]
    assert main([*arguments, str(tmp_path / "grown")]) == 1
    error = capsys.readouterr().err
    assert name in error and "outside of the folder" in error
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["inspect", "plan", "grow", "verify", "eval", "diff"])
def test_every_command_refuses_config_and_weights_from_elsewhere(
    source: Path, command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    more = {
        "plan": ["--layers", "+1"],
        "grow": ["--layers", "+1", "--no-verify", "--out", str(tmp_path / "out")],
        "verify": [str(source)],
        "diff": [str(source)],
    }.get(command, [])
    assert main([command, str(source), *more]) == 1
    error = capsys.readouterr().err
    assert name in error and "outside of the folder" in error


@pytest.mark.parametrize("shard", ["/etc/passwd", "../model.safetensors", "a/../../x.safetensors"])
def test_shards_outside_are_refused_by_every_command(
    source: Path, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tiny.make_tensors(tiny.llama_config()), shard)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for arguments in (["inspect"], ["verify", str(source)], ["diff", str(source)]):
        assert main([arguments[0], str(source), *arguments[1:]]) == 1
        assert "not the name of a safetensors file" in capsys.readouterr().err


def test_links_inside_and_the_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "text").mkdir()
    (source / "text" / "mit").write_text("MIT")
    (source / "LICENSE").symlink_to("text/mit")
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in source.iterdir():
        if file.is_file():
            (cache / "blobs" / file.name).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    for folder, out in ((source, tmp_path / "a"), (snapshot, tmp_path / "b")):
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.tensors
        out.mkdir()
        assert copy_side_files(folder, out) == ["LICENSE"]
        assert (out / "LICENSE").read_text() == "MIT" and not (out / "LICENSE").is_symlink()


def test_a_false_hub_cache_leads_nowhere(source: Path, secret: Path, tmp_path: Path) -> None:
    """blobs that is itself a link, another repository's blobs, and a chain of links."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (cache / "blobs").symlink_to(tmp_path)
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "key").write_text("key")
    (snapshot / "NOTICE").symlink_to(other / "key")
    (snapshot / "hop").symlink_to(secret)
    (snapshot / "COPYING").symlink_to("hop")
    for name in ("LICENSE", "NOTICE", "COPYING"):
        with pytest.raises(CheckpointError, match="outside of the folder"):
            inside(snapshot, name)


def test_odd_names_and_circles(source: Path) -> None:
    for name in ("/etc/passwd", "../secret", "a/../../b", "a\\..\\b", "a\0b"):
        with pytest.raises(CheckpointError, match="no file inside"):
            inside(source, name)
    (source / "LICENSE").symlink_to("LICENSE")
    with pytest.raises(CheckpointError, match="does not exist"):
        inside(source, "LICENSE")
    with pytest.raises(CheckpointError, match="No such file"):
        inside(source, "absent")


def test_a_pipe_as_a_side_file_is_not_waited_for(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "LICENSE")
    (source / "NOTICE").mkdir()
    arguments = ["grow", str(source), "--layers", "+1", "--no-verify", "--out"]
    assert main([*arguments, str(tmp_path / "grown")]) == 0
    assert not (tmp_path / "grown" / "LICENSE").exists()
