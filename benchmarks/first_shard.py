"""Memory while a 100 GB checkpoint is planned and its first shard written: python first_shard.py

    python benchmarks/first_shard.py SOURCE OUT GROWTH=VALUE ...

SOURCE is made by ``make_checkpoint.py hundred`` (holes: it takes no room on disk). Every shard of
the target is created at its final size, the tensors of the first one are written. Prints resident
megabytes after each step and after every tenth of the shard. No torch.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from growkit.checkpoint import ShardWriter, open_checkpoint, plan_shards
from growkit.surgery.execute import execute
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest


def resident_mb() -> float:
    """Resident set of this process, in MB; the page cache does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


def main(source: Path, out: Path, request: GrowthRequest) -> None:
    seen: dict[str, float] = {"imported": resident_mb()}
    start = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        plan = build_plan(checkpoint, request.operators(), symmetry=request.symmetry_choice())
        shards = plan_shards([tensor.output for tensor in plan.tensors], 5_000_000_000)
        planned = time.perf_counter() - start
        seen["planned"] = resident_mb()
        first = shards.shards[0]
        here = [t for t in plan.tensors if shards.places[t.output.name].shard == first.name]
        total, done, lock = sum(t.nbytes for t in here), 0, threading.Lock()

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                before, done = done, done + count
                if 10 * before // total != 10 * done // total:
                    seen[f"{100 * done // total} % of the shard"] = resident_mb()

        out.mkdir()
        with ShardWriter(out, shards) as writer:
            execute(replace(plan, tensors=tuple(here)), writer, advance=advance)
    print(
        json.dumps(
            {
                "source_gb": round(checkpoint.total_size / 1e9, 1),
                "target_gb": round(shards.total_size / 1e9, 1),
                "shards": len(shards.shards),
                "first_shard_gb": round(total / 1e9, 2),
                "plan_seconds": round(planned, 2),
                "seconds": round(time.perf_counter() - start, 1),
                "resident_mb": {name: round(value, 1) for name, value in seen.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    fields = dict(argument.split("=", 1) for argument in sys.argv[3:])
    main(Path(sys.argv[1]), Path(sys.argv[2]), GrowthRequest(**fields))
