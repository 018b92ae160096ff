# SPDX-License-Identifier: Apache-2.0
"""Which files of a checkpoint folder growkit, transformers or the Hub wrote: what --overwrite may
replace.

The rule: a file may go whose name is one of :data:`_KNOWN`, or which the folder's own growkit.json
lists as copied from its source (``copied_files``), or which is model code that its configs name in
``auto_map`` (with its relative imports); and the folders ``growkit_optimizer/``,
``additional_chat_templates/`` and, where they hold a run or a checkpoint of one, ``training/`` and
``checkpoint-N/``. Anything else is foreign, and is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from growkit.checkpoint.side_files import EXTRA_TEMPLATES, code_files
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.json_files import read_json_object
from growkit.core.names import OPTIMIZER_FOLDER

Overwrite = bool | Literal["all"]

# Matched against the lower-case name.
_KNOWN = (
    # configs, and what describes the folder
    "config.json", "generation_config.json", "*processor_config.json", "growkit.json",
    "feature_extractor_config.json", "growkit_training.json", "growkit_alignment.npz",
    ".growkit-partial", "readme.md", "license*", "licence*", "notice*", "copying*", "use_policy*",
    ".gitattributes",
    # weights
    "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model.bin.index.json",
    # tokenizers
    "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken", "bpe.codes", "chat_template.jinja",
    "chat_template.json",
    # training
    "training_args.bin", "trainer_state.json", "manifest.json", "all_results.json",
    "train_results.json", "eval_results.json", "optimizer.pt", "optimizer*.bin", "scheduler.pt",
    "scheduler.bin", "rng_state*.pth", "metrics.jsonl", "loss.png", "loss.svg",
)  # fmt: skip
# What a training writes into the folder of its run, beside recipe and lock.
RUN_FILES = {
    "checkpoints",
    "data",
    "data.json",
    "grow-now",
    "grow-now.taken",
    "loss.png",
    "metrics.jsonl",
    "stages",
    "stop.json",
    "tensorboard",
    "tokenizer",
}
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SHOWN = 5


def foreign_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of what neither growkit nor transformers wrote; sorted."""
    listed = _listed(folder)
    found: list[str] = []
    for name in os.listdir(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            found += _foreign_inside(path)
        elif not _known(name) and name not in listed:
            found.append(name)
    return sorted(found)


def _foreign_inside(folder: Path) -> list[str]:
    name = folder.name
    if name == OPTIMIZER_FOLDER:
        allowed: tuple[str, ...] = ("state.json", "*.safetensors")
    elif name == EXTRA_TEMPLATES:
        allowed = ("*.jinja",)
    elif name == "optimizer_0":
        allowed = (".metadata", "*.distcp")
    elif name == "training" and (folder / "recipe.yaml").is_file():
        known = (*RUN_FILES, "recipe.yaml", ".lock", "*.partial")
        return [f"{name}/{n}" for n in sorted(os.listdir(folder)) if not _matches(n, known)]
    elif _CHECKPOINT.fullmatch(name) and (folder / "trainer_state.json").is_file():
        return [f"{name}/{inner}" for inner in foreign_files(folder)]
    else:
        return [f"{name}/"]
    return [
        f"{name}/{inner}"
        for inner in os.listdir(folder)
        if not _matches(inner, allowed) or not (folder / inner).is_file()
    ]


def _known(name: str) -> bool:
    return _matches(name.lower(), _KNOWN)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(folder: Path) -> set[str]:
    try:
        copied = read_json_object(folder / "growkit.json").get("copied_files")
    except GrowkitError:
        copied = None
    names = copied if isinstance(copied, list) else []
    return {name for name in names if isinstance(name, str)} | code_files(folder)


def check_replaceable(folder: Path, overwrite: Overwrite) -> None:
    """Raises:
    UsageError: replacing the folder would delete foreign files, which it names.
    """
    foreign = [] if overwrite == "all" else foreign_files(folder)
    if foreign:
        shown = ", ".join(map(repr, foreign[:_SHOWN]))
        more = f" and {len(foreign) - _SHOWN} more" if foreign[_SHOWN:] else ""
        raise UsageError(
            f"--overwrite would delete {shown}{more} in {str(folder)!r}, which neither growkit nor "
            "transformers wrote.",
            "Move them away, choose another folder, or delete them too with --overwrite=all.",
        )
