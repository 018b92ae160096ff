"""Folders of training wrappers, and indexes that do not fit: what the error advises works."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import INDEX_FILE
from growkit.cli.main import main

CONFIG = tiny.llama_config()


def plan(folder: Path) -> list[str]:
    return ["plan", str(folder), "--layers", "+1", "-q"]


def advised(error: str) -> list[str]:
    """The growkit command at the end of an error message."""
    words = shlex.split(" ".join(error.split()).split("growkit index", 1)[1])
    return ["index", *words]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = tiny.read_folder(a), tiny.read_folder(b)
    return first.keys() == second.keys() and all(
        tiny.same_bits(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model.", "module._orig_mod."]
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_prefix_is_named_and_the_advised_command_helps(
    prefix: str, shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny.make_tensors(CONFIG)
    plain = tiny.write_folder(tmp_path / "plain", CONFIG, tensors)
    folder = tmp_path / "with prefix"
    _write(folder, {prefix + name: tensor for name, tensor in tensors.items()}, shards)
    (folder / "LICENSE").write_text("MIT")
    assert main(plan(folder)) == 1
    error = capsys.readouterr().err
    assert repr(prefix) in error
    assert main(advised(error)) == 0
    made = Path(str(folder) + "-plain")
    assert same_tensors(made, plain) and (made / "LICENSE").read_text() == "MIT"
    assert main(plan(made)) == 0


def _write(folder: Path, tensors: tiny.Tensors, shards: int) -> None:
    """As tiny_checkpoints does, whatever the names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32"}))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        tiny._write_file(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "sharded", CONFIG, shards=3)


@pytest.mark.parametrize("damage", ["lacks a tensor", "other file names", "wrong shard", "absent"])
def test_an_index_is_rebuilt_from_the_shards(
    damage: str, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = sharded / INDEX_FILE
    before = json.loads(index.read_text())
    changed = json.loads(index.read_text())
    names = sorted(changed["weight_map"])
    if damage == "lacks a tensor":
        del changed["weight_map"][names[4]]
    elif damage == "other file names":
        changed["weight_map"] = {
            name: file.replace("-of-000", "-of-009") for name, file in before["weight_map"].items()
        }
    else:
        changed["weight_map"][names[0]] = "model-00003-of-00003.safetensors"
        changed["weight_map"][names[1]] = "model-00002-of-00003.safetensors"
    changed["metadata"]["note"] = "kept"
    index.write_text(json.dumps(changed))
    if damage == "absent":
        index.unlink()
    assert main(plan(sharded)) == 1
    assert main(advised(capsys.readouterr().err)) == 0
    assert main(plan(sharded)) == 0
    after = json.loads(index.read_text())
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert damage == "absent" or after["metadata"]["note"] == "kept"
    assert not list(sharded.glob("*.partial"))


def test_index_refuses_what_it_cannot_decide(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (sharded / INDEX_FILE).read_bytes()
    shutil.copyfile(sharded / "model-00001-of-00003.safetensors", sharded / "old.safetensors")
    assert main(["index", str(sharded)]) == 1
    assert "in two shards" in capsys.readouterr().err
    assert (sharded / INDEX_FILE).read_bytes() == before
    (sharded / "old.safetensors").unlink()
    single = tiny.make_folder(tmp_path / "single", CONFIG)
    assert main(["index", str(single)]) == 2
    assert "needs no index" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for arguments in (
        [tmp_path / "empty"], [tmp_path / "none"], [sharded, "--out", tmp_path / "x"],
        [sharded, "--strip-prefix", "nope.", "--out", tmp_path / "x"],
    ):  # fmt: skip
        assert main(["index", *map(str, arguments)]) == 2
    assert not (tmp_path / "x").exists()


def test_classifiers_and_multimodal_wrappers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny.make_tensors(CONFIG)
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:2]
    folder = tiny.write_folder(tmp_path / "classifier", CONFIG, tensors)
    assert main(plan(folder)) == 1
    error = capsys.readouterr().err
    assert "classifier" in error and "score.weight" in error
    wrapper = {"model_type": "newest_vl", "text_config": {"model_type": "llama"}}
    folder = tiny.write_folder(tmp_path / "newest_vl", CONFIG, tensors)
    (folder / "config.json").write_text(json.dumps(wrapper))
    assert main(plan(folder)) == 2
    error = capsys.readouterr().err
    assert "wrapper" in error and "'llama'" in error and "text_config" in error


def test_diff_fails_where_the_folder_is_not_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.make_folder(tmp_path / "source", CONFIG)
    grown = tmp_path / "grown"
    tiny.grow(source, grown, ffn="x2")
    assert main(["diff", str(source), str(grown)]) == 0
    with open(grown / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    assert main(["diff", str(source), str(grown)]) == 3
    captured = capsys.readouterr()
    assert "is not what its growkit.json says" in captured.err and "has changed" in captured.out
    (grown / "growkit_training.json").write_text("{}")
    assert main(["diff", str(source), str(grown)]) == 0
