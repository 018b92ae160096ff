"""Real processes, forked from a server that has imported torch and the trainer once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
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


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


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


@dataclass
class Launch:
    """Started processes of one run, by rank."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 90) -> list[int | None]:
        """Their exit codes; a process that hangs is ended and has None."""
        codes = []
        for process in self.processes:
            process.join(timeout)
            codes.append(process.exitcode)
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
