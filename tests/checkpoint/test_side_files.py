"""Which files beside the weights go along, and that they do so byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growkit.checkpoint import copy_side_files
from growkit.core.errors import CheckpointError

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
LEFT = (
    "config.json",
    "growkit.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "optimizer.pt",
    "optimizer_state.json",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "running_loss.json",
    "training_args.bin",
    "training_args.json",
    "train_results.json",
    "params.json",
    "model.gguf",
    "flax_model.msgpack",
    "tf_model.h5",
    "README.md",
    ".gitattributes",
    "notes.txt",
)
CODE = ("modeling_x.py", "helpers.py")


def _folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number, name in enumerate((*COPIED, *LEFT, *CODE)):
        (source / name).write_bytes(b"\xff\x00\r\n%d" % number)
    (source / "config.json").write_text("{}")
    (source / "checkpoint-100").mkdir()
    (source / "folder.json").mkdir()
    return source, target


def test_copies_bytes_of_the_right_files(tmp_path: Path) -> None:
    source, target = _folders(tmp_path)
    names = copy_side_files(source, target)
    assert names == sorted(COPIED)
    assert sorted(path.name for path in target.iterdir()) == sorted(COPIED)
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_goes_along_only_with_auto_map(tmp_path: Path, file: str) -> None:
    source, target = _folders(tmp_path)
    (source / file).write_text(json.dumps({"auto_map": {"AutoConfig": "modeling_x.XConfig"}}))
    assert copy_side_files(source, target) == sorted((*COPIED, *CODE))


@pytest.mark.parametrize("form", [{"AutoTokenizer": ["t.Slow", "t.Fast"]}, ["t.Slow", None]])
def test_code_of_another_class_stays_behind_and_the_tokenizers_goes_along(
    tmp_path: Path, form: object
) -> None:
    source, target = _folders(tmp_path)
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "modeling_x.X"}}))
    assert copy_side_files(source, target, model_code=False) == sorted(COPIED)
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": form}))
    (source / "t.py").write_text("import json\nfrom .helpers import (\n    a,\n)\n")
    names = copy_side_files(source, target, model_code=False)
    assert names == sorted((*COPIED, "t.py", "helpers.py"))


def test_additional_templates(tmp_path: Path) -> None:
    source, target = _folders(tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "additional_chat_templates" / "other.bin").write_text("x")
    assert "additional_chat_templates/tool.jinja" in copy_side_files(source, target)
    assert [path.name for path in (target / "additional_chat_templates").iterdir()] == [
        "tool.jinja"
    ]


def test_large_unknown_json_is_no_side_file_but_a_large_tokenizer_is(tmp_path: Path) -> None:
    source, target = _folders(tmp_path)
    for name in ("dump.json", "tokenizer.json"):
        with open(source / name, "wb") as file:
            file.truncate(20_000_000)
    names = copy_side_files(source, target)
    assert "dump.json" not in names
    assert (target / "tokenizer.json").stat().st_size == 20_000_000


def test_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    source, target = _folders(tmp_path)
    (source / "blob").write_text("linked")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to(source / "blob")
    copy_side_files(source, target)
    assert (target / "merges.txt").read_text() == "linked"
    assert not (target / "merges.txt").is_symlink()
    (source / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"'merges\.txt'.*link"):
        copy_side_files(source, target)
