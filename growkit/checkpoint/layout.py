"""Folders without safetensors weights: what they hold instead, and the one thing to do.

Which files of a folder are the checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.files import COPY_AGAIN
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG, INDEX_FILE, SINGLE_FILE, TOKENIZER

ADAPTER = "adapter_config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OTHERS = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "consolidated.00.pth": "original (consolidated.*.pth)",
    "model.onnx": "ONNX",
}


def other_format(path: Path, files: Collection[str]) -> UsageError | None:
    """Why a folder with these files cannot be read, and the remedy; None for an ordinary one.

    The remedy for pickled weights and adapters is one line to run as it is. It writes a folder
    beside the source, which is left as it was.
    """
    if any(name in files for name in _PICKLED):
        return UsageError(
            f"{str(path)!r} has pytorch_model.bin weights, and only safetensors is read.",
            f"Convert it by: {conversion(path, files)}",
        )
    if ADAPTER in files:
        base = _read(path / ADAPTER).get("base_model_name_or_path")
        return UsageError(
            f"{str(path)!r} holds an adapter"
            + (f" of {base!r}" if base else "")
            + ", not a whole model.",
            "Merge it by: "
            + _line(
                "from peft import AutoPeftModelForCausalLM as M",
                f"M.from_pretrained({str(path)!r}, dtype='auto')"
                f".merge_and_unload().save_pretrained({str(path) + '-merged'!r})",
            ),
        )
    gguf = sorted(name for name in files if name.endswith(".gguf"))
    if gguf:
        return UsageError(
            f"{str(path)!r} has {gguf[0]!r} and no safetensors; GGUF holds weights for inference, "
            "most of them quantised.",
            "Grow the safetensors checkpoint that it was made from, and convert the result.",
        )
    for name, kind in _OTHERS.items():
        if name in files:
            return UsageError(
                f"{str(path)!r} has {kind} weights, and only safetensors is read.",
                "Get the safetensors files of this model, or convert it with transformers first.",
            )
    return None


def conversion(path: Path, files: Collection[str] = (), source: str | None = None) -> str:
    """A shell command that writes ``path`` (or the Hub id ``source``) as safetensors."""
    config = _read(path / CONFIG)
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list) and named and _identifier(named[0]) else None
    if kind is None:
        seq2seq = config.get("is_encoder_decoder")
        kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    origin = source or str(path)
    out = (source.split("/")[-1] if source else str(path)) + "-safetensors"
    steps = [
        f"from transformers import {kind} as M, AutoTokenizer as T",
        f"M.from_pretrained({origin!r}, dtype='auto').save_pretrained({out!r})",
    ]
    if source or any(name in files for name in _TOKENIZERS):
        steps.append(f"T.from_pretrained({origin!r}).save_pretrained({out!r})")
    return _line(*steps)


def _line(*steps: str) -> str:
    code = "; ".join(steps)
    # Double quotes read best, but a shell would look for its own signs inside them.
    quoted = shlex.quote(code) if any(sign in code for sign in '"$`\\!') else f'"{code}"'
    return f"python -c {quoted}"


def _identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, non_finite=True)
    except CheckpointError:
        return {}


MAX_CONFIG_BYTES = 16_000_000
_MAX_INDEX_BYTES = 64_000_000
_MODEL_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def find_weights(path: Path, required: bool) -> dict[str, set[str] | None]:
    """Shard -> names that the index expects in it (None without an index), sorted by shard."""
    files = {entry.name for entry in os.scandir(path)}
    numbered = sorted(name for name in files if _MODEL_SHARD.fullmatch(name))
    if INDEX_FILE not in files:
        if SINGLE_FILE in files:
            if numbered:
                raise _mixed(SINGLE_FILE, numbered)
            return {SINGLE_FILE: None}
        if numbered:
            raise CheckpointError(
                f"{str(path)!r} has {numbered[0]!r} but no {INDEX_FILE}.",
                f"Copy or download the index too, or make it: {_rebuild(path)}",
            )
        if required:
            raise _no_weights(path, files)
        return {}
    weight_map = _read_index(path / INDEX_FILE)
    missing = [shard for shard in weight_map if shard not in files]
    if missing:
        raise CheckpointError(
            f"{INDEX_FILE} names {len(missing)} missing shard(s): {', '.join(missing[:5])}.",
            "Copy or download them too"
            + (f", or, if none is lacking: {_rebuild(path)}" if numbered else "."),
        )
    if SINGLE_FILE in files and SINGLE_FILE not in weight_map:
        # from_pretrained would load the single file and ignore the index without a word.
        raise _mixed(SINGLE_FILE, [INDEX_FILE])
    stale = [name for name in numbered if name not in weight_map]
    if stale:
        raise _mixed(stale[0], [INDEX_FILE])
    return {shard: weight_map[shard] for shard in sorted(weight_map)}


def _rebuild(path: Path) -> str:
    return f"growkit index {shlex.quote(str(path))}"


def _mixed(first: str, others: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The folder mixes two saves: {first!r} does not belong to {others[0]!r}.",
        "Remove the files of the older one.",
    )


def _no_weights(path: Path, files: set[str]) -> UsageError:
    from growkit.checkpoint.hub import origin

    other = other_format(path, files)
    if other is not None:
        return other
    name, commit = origin(path)
    if commit is not None:  # only safetensors were asked for
        return UsageError(
            f"The Hub model {name!r} has no safetensors weights.",
            f"If it has pytorch_model.bin, convert it by: {conversion(path, source=name)}",
        )
    return UsageError(
        f"{str(path)!r} has no weights.", f"It must hold {SINGLE_FILE} or {INDEX_FILE} with shards."
    )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    index = read_json_object(path, limit=_MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name!r} has no weight_map.", COPY_AGAIN)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        known = isinstance(shard, str) and shard in shards
        if not known and not (isinstance(shard, str) and _plain_file_name(shard)):
            raise CheckpointError(
                f"{path.name!r} puts tensor {name!r} into {shard!r}, which is not the name of a "
                "safetensors file in the folder.",
                "Do not use this index: it may come from an untrusted source.",
            )
        shards.setdefault(shard, set()).add(name)
    return dict(shards)


def _plain_file_name(name: str) -> bool:
    """No folder, no drive, no hidden file: the index must not lead out of the checkpoint."""
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(letter in "/\\:" or not letter.isprintable() for letter in name)
    )
