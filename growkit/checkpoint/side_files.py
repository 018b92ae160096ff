"""The small files beside the weights that stay valid when a model grows: copied as bytes.

Which files of a checkpoint folder growkit, transformers or the Hub wrote: what --overwrite may
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
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal

from growkit.checkpoint.links import inside
from growkit.core.errors import CheckpointError, GrowkitError, UsageError
from growkit.core.files import open_regular, read_bytes
from growkit.core.json_files import read_json, read_json_object
from growkit.core.names import OPTIMIZER_FOLDER
from growkit.core.os_errors import about
from growkit.core.writing import write_blocks

# Patterns are matched against the lower-case name; a name that matches NEVER is not copied.
_ALWAYS = (
    "*.json",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "chat_template.*",
    "license*",
    "licence*",
    "notice*",
    "copying*",
    "use_policy*",
)
_NEVER = (
    "config.json",  # the caller writes the grown one
    "growkit.json",
    "growkit_training.json",  # of the run that made the source
    "manifest.json",
    "*.index.json",
    "trainer_state.json",
    "running_loss.json",  # of a checkpoint of growkit train
    "*_results.json",
    "training_args*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "params.json",  # sizes of the old model
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.safetensors",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "readme*",
    ".*",
)
_MODEL, _TOKENIZER = "config.json", "tokenizer_config.json"
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import ", re.MULTILINE)
EXTRA_TEMPLATES = "additional_chat_templates"
_LARGE_JSON = ("tokenizer*", "vocab.*")
_MAX_JSON_BYTES = 16_000_000


def copy_side_files(
    source: Path,
    target: Path,
    *,
    model_code: bool = True,
    leave_out: Collection[str] = (),
) -> list[str]:
    """Copy generation config, tokenizer, chat templates, licence and ``auto_map`` code.

    Never copied: weights, index, optimizer and trainer state, config.json, growkit.json, README.

    Args:
        source: a checkpoint folder.
        target: an existing folder.
        model_code: the code that config.json names is that of the written model too; else only
            what the tokenizer needs goes along.
        leave_out: names that are written otherwise.

    Returns:
        The copied names relative to the folder, sorted.

    Raises:
        CheckpointError: a file that should be copied is a broken link or leads out of the folder.
    """
    names = side_file_names(source, model_code=model_code, leave_out=leave_out)
    if any("/" in name for name in names):
        (target / EXTRA_TEMPLATES).mkdir(exist_ok=True)
    for name in names:
        # Content only: the owner and the mode of a download cache are not the output's.
        with open_regular(inside(source, name)) as file:
            write_blocks(target / name, _blocks(file, source / name))
    return names


def _blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    with about(path):
        while block := file.read(1 << 20):
            yield block


def side_file_names(
    source: Path, *, model_code: bool = True, leave_out: Collection[str] = ()
) -> list[str]:
    """The names that :func:`copy_side_files` copies, sorted."""
    code = _code_files(source, model_code)
    names = [path.name for path in source.iterdir() if _wanted(path, code)]
    names = [name for name in names if name not in leave_out]
    templates = source / EXTRA_TEMPLATES
    if templates.is_dir():
        names += [f"{EXTRA_TEMPLATES}/{path.name}" for path in templates.glob("*.jinja")]
    return sorted(names)


def _code_files(source: Path, model_code: bool) -> set[str]:
    """Names of the Python files that go along."""
    model, tokenizer = _modules(source / _MODEL), _modules(source / _TOKENIZER)
    if model_code:
        # A module may import its siblings in any way, so all of them go along.
        return {path.name for path in source.glob("*.py")} if model or tokenizer else set()
    return _with_imports(source, tokenizer)


def code_files(folder: Path) -> set[str]:
    """Names of the Python files that the folder's configs name, and of those that these import."""
    return _with_imports(folder, _modules(folder / _MODEL) + _modules(folder / _TOKENIZER))


def _with_imports(source: Path, waiting: list[str]) -> set[str]:
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (source / name).is_file():
            found.add(name)
            text = read_bytes(source / name).decode("utf-8", errors="replace")
            waiting += _RELATIVE_IMPORT.findall(text)
    return found


def _wanted(path: Path, code: set[str]) -> bool:
    name = path.name.lower()
    if not (path.is_file() or (path.is_symlink() and not path.exists())):
        return False
    if name.endswith(".py"):
        return path.name in code
    if _matches(name, _NEVER) or not _matches(name, _ALWAYS):
        return False
    if name.endswith(".json") and not _matches(name, _LARGE_JSON) and path.exists():
        return path.stat().st_size <= _MAX_JSON_BYTES
    return True


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _modules(path: Path) -> list[str]:
    """Modules that the ``auto_map`` of a config names: ``module.Class``, or a list of such."""
    try:
        value = read_json(path, non_finite=True)
    except CheckpointError:
        return []
    auto_map = value.get("auto_map") if isinstance(value, dict) else None
    if isinstance(auto_map, dict):
        auto_map = list(auto_map.values())
    # Tokenizers have a slow and a fast class, either of which may be null.
    entries = auto_map if isinstance(auto_map, list) else []
    named = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return [name.partition(".")[0] for name in named if isinstance(name, str)]


Overwrite = bool | Literal["all"]

# Matched against the lower-case name.
_KNOWN = (
    # configs, and what describes the folder
    "config.json", "generation_config.json", "*processor_config.json", "growkit.json",
    "feature_extractor_config.json", "growkit_training.json", "data_position.json",
    "growkit_alignment.npz",
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
    "change_point.json",
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
        return [f"{name}/{n}" for n in sorted(os.listdir(folder)) if not _is_named(n, known)]
    elif _CHECKPOINT.fullmatch(name) and (folder / "trainer_state.json").is_file():
        return [f"{name}/{inner}" for inner in foreign_files(folder)]
    else:
        return [f"{name}/"]
    return [
        f"{name}/{inner}"
        for inner in os.listdir(folder)
        if not _is_named(inner, allowed) or not (folder / inner).is_file()
    ]


def _known(name: str) -> bool:
    return _is_named(name.lower(), _KNOWN)


def _is_named(name: str, patterns: Iterable[str]) -> bool:
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
