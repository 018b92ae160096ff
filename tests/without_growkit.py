"""Run a script as a user has it who never installed growkit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Any import of growkit fails, wherever it may be installed.
FORBID = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "growkit":
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Forbidden())
"""


def run_without_growkit(script: str, *arguments: object, cache: Path, forbid: bool = True) -> str:
    """stdout of a fresh interpreter, isolated from this checkout.

    ``cache`` gets the code that transformers copies out of folders.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", (FORBID if forbid else "") + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cache,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
