# SPDX-License-Identifier: Apache-2.0
"""Runs ``growkit`` in a forked child in which one operation on files fails, or kills it.

The parent has imported everything, so that a child costs no more than its work. Operations that
change or read files report themselves to Python's audit hook; those on open descriptors do not and
are wrapped.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from growkit.cli.main import main

AUDITED = ("open", "os.", "shutil.copyfile", "fcntl.flock")
WRAPPED = ("pwrite", "preadv", "write", "fsync", "ftruncate", "copy_file_range", "sendfile")


class Outcome(NamedTuple):
    """Exit code (negative: the signal that ended it), what it said, what the fault met."""

    code: int
    err: str
    hit: str


def run(
    arguments: list[str],
    log: Path,
    *,
    within: Path,
    fault: Callable[[int, str, str], None] = lambda number, event, path: None,
) -> Outcome:
    """Run a command; ``fault`` is called before each operation and may raise or kill.

    Args:
        arguments: of the command line.
        log: takes what the child says.
        within: operations that name a path outside of this folder are not counted.
        fault: number of the operation from 0, its name and its path ("" where there is none).
    """
    child = os.fork()
    if child == 0:
        try:
            _child(arguments, log, within, fault)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    said, _, hit = log.read_text().partition("\0")
    return Outcome(code, said, hit)


def _child(
    arguments: list[str], log: Path, within: Path, fault: Callable[[int, str, str], None]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(os.dup(descriptor), "w", buffering=1)
    sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    count, active, hits = 0, True, list[str]()
    raw_write = os.write

    def operation(event: str, path: str) -> None:
        nonlocal count, active
        if not active:
            return
        active = False  # what the fault itself does is not counted
        number, count = count, count + 1
        try:
            fault(number, event, path)
        except OSError as error:
            hits.append(f"{number} {event} {path} {error.strerror}")
            raise
        finally:
            active = True

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if active and event.startswith(AUDITED):
            paths = [os.fsdecode(v) for v in values if isinstance(v, (str, bytes, os.PathLike))]
            paths = [path for path in paths if path.startswith(str(within))]
            if paths or event == "fcntl.flock":
                operation(event, paths[0] if paths else "")

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*values: Any) -> Any:
            operation(name, "")
            return real(*values)

        setattr(os, name, call)

    for name in WRAPPED:
        if hasattr(os, name):
            wrap(name)
    sys.addaudithook(hook)
    code = main(arguments)
    active = False
    sys.stderr.flush()
    raw_write(descriptor, b"\0" + "; ".join(hits).encode())
    os._exit(code)


def raising(number: int, code: int) -> Callable[[int, str, str], None]:
    """A fault: the operation of that number fails with an errno."""

    def fault(at: int, event: str, path: str) -> None:
        if at == number:
            raise OSError(code, os.strerror(code), *([path] if path else []))

    return fault


def killing(number: int) -> Callable[[int, str, str], None]:
    """A fault: the process is killed before the operation of that number."""

    def fault(at: int, event: str, path: str) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def content(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder; None where there is none."""
    if not folder.exists():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
