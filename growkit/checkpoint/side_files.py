"""The small files beside the weights that stay valid when a model grows: copied as bytes."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from growkit.errors import CheckpointError

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
_CONFIGS_WITH_CODE = ("config.json", "tokenizer_config.json")
_EXTRA_TEMPLATES = "additional_chat_templates"
_LARGE_JSON = ("tokenizer*", "vocab.*")
_MAX_JSON_BYTES = 16_000_000


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy generation config, tokenizer, chat templates, licence and ``auto_map`` code.

    Never copied: weights, index, optimizer and trainer state, config.json, growkit.json, README.

    Args:
        source: a checkpoint folder.
        target: an existing folder.

    Returns:
        The copied names relative to the folder, sorted.

    Raises:
        CheckpointError: a file that should be copied is a broken link.
    """
    with_code = any(_has_auto_map(source / name) for name in _CONFIGS_WITH_CODE)
    names = [path.name for path in source.iterdir() if _wanted(path, with_code)]
    templates = source / _EXTRA_TEMPLATES
    if templates.is_dir():
        (target / _EXTRA_TEMPLATES).mkdir(exist_ok=True)
        names += [f"{_EXTRA_TEMPLATES}/{path.name}" for path in templates.glob("*.jinja")]
    for name in sorted(names):
        try:
            # Content only: the owner and the mode of a download cache are not the output's.
            shutil.copyfile(source / name, target / name)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{name!r} in {str(source)!r} is a link to a file that does not exist.",
                "Download the checkpoint again.",
            ) from error
    return sorted(names)


def _wanted(path: Path, with_code: bool) -> bool:
    name = path.name.lower()
    if not (path.is_file() or (path.is_symlink() and not path.exists())):
        return False
    if name.endswith(".py"):
        return with_code  # a module imports its siblings, so all of them go along
    if _matches(name, _NEVER) or not _matches(name, _ALWAYS):
        return False
    if name.endswith(".json") and not _matches(name, _LARGE_JSON) and path.exists():
        return path.stat().st_size <= _MAX_JSON_BYTES
    return True


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _has_auto_map(path: Path) -> bool:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value.get("auto_map"))
