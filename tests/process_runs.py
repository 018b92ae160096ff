"""Real processes, forked from a server that has imported torch and the trainer once."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from growkit.training import metrics

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["growkit.training.trainer", "growkit.training.stop", "growkit.modeling",
     "growkit.data.tokenizer", "growkit.verification.loading", "growkit.cli.train",
     "transformers.models.llama.modeling_llama", "torch.distributed.fsdp",
     "torch.distributed.checkpoint.state_dict"]
)  # fmt: skip


# Below the range that the system takes ports of outgoing connections from.
_PORTS = range(20_000, 32_000)
_taken: dict[int, Any] = {}


def free_port() -> int:
    """A port for this test process alone.

    One that is free now may belong to somebody else before the first process of a launch listens on
    it: to another launch, whose processes would then meet with ours and wait for ever. A lock keeps
    other test processes away.
    """
    folder = Path(tempfile.gettempdir()) / "growkit-test-ports"
    folder.mkdir(exist_ok=True)
    for port in random.Random(os.getpid()).sample(_PORTS, 1_000):
        if port in _taken:
            continue
        held = (folder / str(port)).open("w")
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        _taken[port] = held  # until this process ends
        return port
    raise OSError("no free port")


def write_picture(curves: Any, target: Path, **options: Any) -> bool:
    """In place of ``plot_losses``: the same files are written, and nothing is drawn."""
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(b"\x89PNG\r\n\x1a\n")
    os.replace(partial, target)
    return True


def _child(
    work: Callable[[Sequence[str]], int],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: str,
) -> None:
    gc.freeze()  # what the server has imported is no garbage
    # Workers that load data are this process's own, and end with it; of a server they would not.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    os.fsync = lambda descriptor: None
    metrics.plot_losses = write_picture
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(work(arguments))


def growkit(arguments: Sequence[str]) -> int:
    """The command line in this process."""
    from growkit.cli.main import main

    return main(list(arguments))


def script(arguments: Sequence[str]) -> int:
    """A Python file as a program: its path and what it is given."""
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


def study_run(arguments: Sequence[str]) -> int:
    """A run of a study; it ends with the server that it was forked from."""
    from growkit.study.one_run import main

    os.setsid()
    return main([arguments[0], str(os.getppid())])


class ForkedRun:
    """In place of the ``subprocess.Popen`` that a study starts its runs with."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Any, **_: Any) -> None:
        self._process = _CONTEXT.Process(
            target=_child, args=(study_run, list(command[-2:]), dict(env), stdout.name)
        )
        self._process.start()
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()


AFTER_A_FAILURE = 60  # seconds


@dataclass
class Launch:
    """Started processes of one run, by rank."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 90) -> list[int | None]:
        """Their exit codes; a process that hangs is ended and has None."""
        end = time.monotonic() + timeout
        while waiting := [p for p in self.processes if p.exitcode is None]:
            left = end - time.monotonic()
            if left <= 0:
                break
            multiprocessing.connection.wait([p.sentinel for p in waiting], left)
            for process in waiting:
                process.join(0)
            # Where one failed, the others end by themselves, or hang.
            if any(p.exitcode for p in self.processes):
                end = min(end, time.monotonic() + AFTER_A_FAILURE)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        return codes

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()


def start(
    count: int,
    arguments: Sequence[str],
    work: Callable[[Sequence[str]], int] = growkit,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """Start ``count`` processes with the environment that torchrun gives its own."""
    folder = Path(tempfile.mkdtemp())
    port = str(free_port())
    processes, logs = [], []
    for rank in range(count):
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if count > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        variables |= environment or {}
        logs.append(folder / f"{rank}.log")
        process = _CONTEXT.Process(
            target=_child, args=(work, list(arguments), variables, str(logs[-1]))
        )
        process.start()
        processes.append(process)
    return Launch(processes, logs)


def run(
    count: int,
    arguments: Sequence[str],
    work: Callable[[Sequence[str]], int] = growkit,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """Start, wait, and expect success."""
    launch = start(count, arguments, work, environment)
    codes = launch.wait(600)  # a hang; a busy machine is slow
    assert codes == [0] * count, "\n".join(launch.output(rank) for rank in range(count))
    return launch
