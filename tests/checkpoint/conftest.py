"""A checkpoint folder on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import Tensors, make_tensors, save_sharded
from safetensors.numpy import save_file


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with config.json and one file (default) or two shards."""

    def make(
        name: str = "source", *, sharded: bool = False, tensors: Tensors | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}\n')
        tensors = make_tensors() if tensors is None else tensors
        if sharded:
            names = list(tensors)
            half = len(names) // 2
            save_sharded(
                folder,
                {
                    "model-00001-of-00002.safetensors": {n: tensors[n] for n in names[:half]},
                    "model-00002-of-00002.safetensors": {n: tensors[n] for n in names[half:]},
                },
            )
        else:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
