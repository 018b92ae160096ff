"""What a written folder says about itself: config, stored tensors, growkit's manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from growkit.checkpoint.hub import origin
from growkit.checkpoint.layout import find_weights
from growkit.checkpoint.links import check_links, inside
from growkit.core.errors import CheckpointError, UsageError
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG, MANIFEST
from growkit.vocabulary.tokenizer_files import VOCABULARY_FILES

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder as it lies on disk; nothing is loaded."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return origin(self.path)[0]

    @property
    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in VOCABULARY_FILES)

    @cached_property
    def tensors(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """name -> (file, safetensors dtype, shape), of the files that transformers reads."""
        found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a dict
                        part = tensors.get_slice(name)
                        found[name] = (file, part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file.name} in {str(self.path)!r} cannot be read: {error}.",
                    "The file is missing or damaged: copy or grow the checkpoint again.",
                ) from error
        return found

    def _files(self) -> list[Path]:
        return [inside(self.path, name) for name in find_weights(self.path, required=True)]

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(torch.Size(shape).numel() for _, _, shape in self.tensors.values())

    @cached_property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which most of the weights are stored."""
        counts: dict[str, int] = {}
        for _, dtype, shape in self.tensors.values():
            counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
        most = max(counts, key=lambda dtype: counts[dtype], default="F32")
        return TORCH_DTYPES.get(most, torch.float32)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan in growkit.json, or an empty dict."""
        plan = self.manifest.get("plan", {})
        return plan if isinstance(plan, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, non_finite=True, remedy="Copy or grow the checkpoint again.")


def open_folder(path: Path) -> Folder:
    """Read config and manifest of a checkpoint folder.

    Raises:
        UsageError: not a folder, or without a config.json.
        CheckpointError: a JSON file is damaged.
    """
    if not path.is_dir():
        raise UsageError(
            f"{str(path)!r} is not a folder.", "Give a folder with config.json and safetensors."
        )
    if not (path / CONFIG).is_file():
        raise UsageError(
            f"{str(path)!r} has no config.json.", "Give a folder with config.json and safetensors."
        )
    check_links(path)
    manifest = path / MANIFEST
    return Folder(
        path, _read_json(path / CONFIG), _read_json(manifest) if manifest.is_file() else {}
    )
