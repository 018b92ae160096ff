"""growkit as a library: python benchmarks/grow_in_process.py SOURCE OUT FIELD=VALUE ...

Prints the seconds of ``grow_checkpoint`` alone: no start of the interpreter, no imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest

if __name__ == "__main__":
    request = GrowthRequest(**dict(field.split("=", 1) for field in sys.argv[3:]))
    start = time.perf_counter()
    grow_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), request, verify=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "torch": "torch" in sys.modules}))
