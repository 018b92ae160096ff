"""The floor to compare with: python benchmarks/copy_bytes.py SOURCE OUT BYTES

Copies the shards of SOURCE into OUT, again and again until BYTES are written, inside the kernel
(copy_file_range, as cp does), then makes every file durable. Prints its seconds, without the start
of the interpreter.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

RANGE_BYTES = 1 << 20


def copy_bytes(source: Path, out: Path, nbytes: int) -> None:
    """Write ``nbytes`` bytes of the source's shards to new files in ``out``, then fsync them."""
    shards = sorted(source.glob("*.safetensors"))
    out.mkdir()
    targets = []
    done = 0
    while done < nbytes:
        shard = shards[len(targets) % len(shards)]
        reader = os.open(shard, os.O_RDONLY)
        writer = os.open(out / f"{len(targets)}.bin", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        size = min(shard.stat().st_size, nbytes - done)
        position = 0
        while position < size:
            part = min(RANGE_BYTES, size - position)
            position += os.copy_file_range(reader, writer, part, position, position)
        os.close(reader)
        targets.append(writer)
        done += size
    for writer in targets:
        os.fsync(writer)
        os.close(writer)


if __name__ == "__main__":
    start = time.perf_counter()
    copy_bytes(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"seconds": time.perf_counter() - start}))
