"""Run a script as a user has it who never installed growkit."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache as once
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
# Importing transformers takes longer than most scripts, so it is done once, and each script runs in
# a fork that has imported it.
SERVER = """
import json, os, traceback
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import dynamic_module_utils
from transformers.models.llama import modeling_llama
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(asked["stdout"], os.O_WRONLY), 1)
            os.dup2(os.open(asked["stderr"], os.O_WRONLY), 2)
            os.chdir(asked["cache"])
            dynamic_module_utils.HF_MODULES_CACHE = asked["cache"]
            sys.argv = ["-c", *asked["arguments"]]
            exec(asked["script"], {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_without_growkit(script: str, *arguments: object, cache: Path) -> str:
    """stdout of a process that is isolated from this checkout, and has imported transformers.

    ``cache`` gets the code that transformers copies out of folders.
    """
    server = _server()
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        asked = {
            "script": script,
            "arguments": [*map(str, arguments)],
            "cache": str(cache),
            "stdout": stdout.name,
            "stderr": stderr.name,
        }
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        assert code == "0", f"ended with {code or 'its server'}: {stderr.read()}"
        return stdout.read()


@once
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", FORBID + SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    atexit.register(server.communicate)  # which closes its stdin: the end of its loop
    return server


def run_isolated(script: str, *arguments: object, cache: Path) -> str:
    """stdout of an interpreter of its own, which sees what is installed and not this checkout."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cache,
        env=_environment() | {"HF_MODULES_CACHE": str(cache)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1"}
