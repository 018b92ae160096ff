"""Real signals to real processes: nothing half-written, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

# Each tensor takes a while, so that the signal meets a run that is writing.
SLOW = """
import sys, time
from growkit.surgery import execute
write = execute._Work.write
def slow(self, tensor):
    time.sleep(0.2)
    write(self, tensor)
execute._Work.write = slow
from growkit.cli.main import run
sys.argv = ["growkit", *sys.argv[1:]]
run()
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_during_growth_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int, word: str, overwrite: bool
) -> None:
    source, out = tiny.make_folder(tmp_path / "a", tiny.llama_config()), tmp_path / "b"
    old = None
    if overwrite:
        tiny.make_folder(out, tiny.llama_config(), seed=1)
        old = {path.name: path.read_bytes() for path in out.iterdir()}
    command = ["grow", str(source), "--ffn", "x2", "--no-verify", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command, "--out", str(out), "--overwrite"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    partial = tmp_path / "b.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("model*.safetensors*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.strip().splitlines()[-1] == word
    assert "Traceback" not in error
    assert not partial.exists()
    if old is None:
        assert not out.exists()
    else:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == old


def test_ctrl_c_while_modules_load(tmp_path: Path) -> None:
    """The signal comes at the first import behind the entry point."""
    script = """
import importlib.abc, os, signal, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Watch())
from growkit.cli.main import run
run()
"""
    for module in ("growkit.cli.app", "typer", "growkit.cli.grow"):
        done = subprocess.run(
            [sys.executable, "-c", script, module], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (130, "interrupted\n"), module


def test_the_signal_handler_of_a_caller_is_given_back() -> None:
    from growkit.cli.main import main

    def mine(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert main(["recipes"]) == 0
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_held_back_arrives_at_the_end_of_the_block() -> None:
    """In the middle of ``Thread.start`` it would leave a lock taken, and the process would hang."""
    from growkit.core.process import signals_held_back

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    seen = []
    try:
        with pytest.raises(SystemExit), signals_held_back():
            signal.raise_signal(signal.SIGTERM)
            seen.append("the block goes on")
        assert seen and signal.getsignal(signal.SIGTERM) is end
        with pytest.raises(KeyboardInterrupt), signals_held_back():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_that_never_ends_keeps_no_interrupted_command() -> None:
    script = """
import os, signal, sys, threading
from growkit.cli import main as module
def growing(build_app, given):
    threading.Thread(target=threading.Event().wait).start()
    os.kill(os.getpid(), signal.SIGTERM)
module._run = growing
sys.argv = ["growkit", "grow"]
module.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 143 and done.stderr.endswith("terminated\n")
