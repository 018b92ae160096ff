"""Fingerprints of a checkpoint, none of which depends on how it is split into files."""

from __future__ import annotations

import hashlib
import json

from growkit.checkpoint.folder import Checkpoint
from growkit.checkpoint.header import TensorInfo
from growkit.core.progress import Progress

_BUFFER_BYTES = 4 << 20


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of config.json's bytes, and of every tensor's name, dtype and shape.

    Costs no read of the weights: two checkpoints of one architecture have the same
    ``headers_sha256`` whatever their weights; see :func:`content_hash`.
    """
    headers = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        headers.update(_describe(checkpoint.tensors[name]))
    return {
        "config_sha256": hashlib.sha256(checkpoint.config_bytes).hexdigest(),
        "headers_sha256": headers.hexdigest(),
    }


def content_hash(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes, in the order of the names.

    Reads everything through one reused buffer; costs more than a copy of the checkpoint.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(_describe(info))
        for offset in range(0, info.nbytes, _BUFFER_BYTES):
            part = buffer[: min(_BUFFER_BYTES, info.nbytes - offset)]
            checkpoint.read_into(name, part, offset)
            digest.update(part)
            if progress is not None:
                progress.advance(len(part))
    return digest.hexdigest()


def _describe(info: TensorInfo) -> bytes:
    # JSON, so that no name can imitate the boundary between two tensors.
    return json.dumps([info.name, info.dtype, list(info.shape)]).encode() + b"\n"
