# SPDX-License-Identifier: Apache-2.0
"""``model.safetensors.index.json`` made again from the headers of the shards, and tensors renamed.

No torch; weights are read only where they are written into a new folder.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growkit.checkpoint.header import FileHeader, read_header
from growkit.checkpoint.hub import not_a_folder
from growkit.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from growkit.checkpoint.links import check_links
from growkit.checkpoint.publish import staged_output
from growkit.checkpoint.shards import OutputTensor, plan_shards
from growkit.checkpoint.side_files import Overwrite, copy_side_files
from growkit.checkpoint.writer import ShardWriter
from growkit.core.errors import CheckpointError, GrowkitError, UsageError, nearest
from growkit.core.files import open_regular
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG, README
from growkit.core.writing import write_whole

_SHARD = re.compile(r"[^.][\w.-]*\.safetensors")
_PIECE = 16 << 20


def rebuild_index(folder: Path) -> dict[str, Any]:
    """Write the index of a folder's shards anew; the old one's other metadata stay.

    Returns:
        ``index`` (path), ``shards``, ``tensors``, ``total_size`` in bytes.

    Raises:
        UsageError: no folder, or one without shards or with a single file, which needs no index.
        CheckpointError: a shard is damaged, or a tensor is in two of them.
    """
    headers = _headers(folder)
    if list(headers) == [SINGLE_FILE]:
        raise UsageError(
            f"{str(folder)!r} has its weights in the one file {SINGLE_FILE}, which needs no index.",
            f"Remove {INDEX_FILE} if there is one."
            if (folder / INDEX_FILE).exists()
            else "Use the folder as it is.",
        )
    weight_map: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in weight_map:
                raise CheckpointError(
                    f"Tensor {name!r} is in two shards: {weight_map[name]!r} and {shard!r}.",
                    "Move the shard that is left over from another save out of the folder.",
                )
            weight_map[name] = shard
    try:
        kept = read_json_object(folder / INDEX_FILE).get("metadata")
    except GrowkitError:
        kept = None
    metadata = dict(kept) if isinstance(kept, dict) else {}
    infos = [info for header in headers.values() for info in header.tensors.values()]
    metadata["total_size"] = sum(info.nbytes for info in infos)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(info.shape) for info in infos)
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    target = write_whole(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")
    return {
        "index": str(target),
        "shards": len(headers),
        "tensors": len(infos),
        "total_size": metadata["total_size"],
    }


def strip_prefix(
    folder: Path,
    prefix: str,
    out: Path,
    *,
    overwrite: Overwrite = False,
    max_shard_size: int = 5 * 10**9,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write a folder whose tensors have lost a prefix of a wrapper; everything else is the same.

    Tensors without the prefix keep their names.

    Returns:
        ``out``, ``tensors`` and ``renamed`` (how many).

    Raises:
        UsageError: no tensor begins so.
        CheckpointError: two tensors would have one name.
    """
    headers = _headers(folder)
    infos = [info for header in headers.values() for info in header.tensors.values()]
    names = {info.name: info.name.removeprefix(prefix) for info in infos}
    renamed = sum(old != new for old, new in names.items())
    if not renamed:
        raise UsageError(
            f"No tensor of {str(folder)!r} begins with {prefix!r}.", "Look at inspect."
        )
    if len(set(names.values())) != len(infos):
        raise CheckpointError(
            f"Without {prefix!r} two tensors of {str(folder)!r} would have the same name.",
            "Keep one of the two copies of the model in the folder.",
        )
    plan = plan_shards(
        [OutputTensor(names[info.name], info.dtype, info.shape) for info in infos], max_shard_size
    )
    with staged_output(
        out, overwrite=overwrite, needed_bytes=plan.output_size, sources=[folder]
    ) as target:
        with ShardWriter(target, plan) as writer:
            for info in infos:
                with open_regular(folder / info.shard) as file:
                    file.seek(info.start)
                    for offset in range(0, info.nbytes, _PIECE):
                        piece = file.read(min(_PIECE, info.nbytes - offset))
                        writer.write(names[info.name], offset, piece)
                        advance(len(piece))
        copy_side_files(folder, target)
        for name in (CONFIG, README):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    return {"out": str(out), "tensors": len(infos), "renamed": renamed}


def _headers(folder: Path) -> dict[str, FileHeader]:
    if not folder.is_dir():
        raise not_a_folder(folder)
    check_links(folder)
    names = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if not names:
        raise UsageError(
            f"{str(folder)!r} has no safetensors files.",
            nearest(folder.name, [p.name for p in folder.parent.iterdir()]) + "Give their folder.",
        )
    return {name: read_header(folder / name) for name in names}
