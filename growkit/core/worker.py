"""A second Python process that imports libraries while this one works, and then makes one call.

Importing torch and transformers takes longer than writing a small checkpoint; on a second core it
takes no time of its own. The worker ends with this process, whatever ends it: its standard input is
closed then. Ctrl-C, which a terminal sends to both, is this process's business alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import IO, Any

from growkit.core.errors import GrowkitError
from growkit.core.process import available_cores, signals_held_back, stopping_signals
from growkit.core.progress import Progress, SilentProgress


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No garbage is collected while modules are imported: looking for it takes a fifth of the time
    that torch and transformers do, and they leave next to none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Before anything is imported from a file, the paths are those of this process: python itself would
# look in the working folder first, which may be a checkpoint that a stranger made.
_START = (
    "import sys; count = int(sys.argv[1]); sys.path[:] = sys.argv[2 : 2 + count]; "
    "from growkit.core.worker import work; work(sys.argv[2 + count :])"
)


class Worker:
    """Calls a function in a process of its own that has been importing since this was made; in this
    process where that would gain nothing.

    Use it in a ``with`` statement: leaving it ends the process, in whatever it is.

    Args:
        wanted: that there will be a call at all.
        modules: imported by the worker, in order. Where this process has one of them already, or
            only one core, there is no worker.
    """

    def __init__(self, *modules: str, wanted: bool = True) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        loaded = any(name in sys.modules for name in modules)
        if wanted and not loaded and available_cores() > 1 and sys.executable:
            paths = [os.path.abspath(path) for path in sys.path]
            command = [sys.executable, "-c", _START, str(len(paths)), *paths, *modules]
            # Where no further process is allowed, without one.
            with contextlib.suppress(OSError), signals_held_back():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what it no longer reads cannot be flushed
                    if stream is not None:
                        stream.close()

    def call(
        self, function: str, arguments: Mapping[str, Any], progress: Progress | None = None
    ) -> Any:
        """Call ``function`` (``module:name``) with ``arguments`` and ``progress``.

        Arguments, result and exceptions are to be of types that this process can read.
        """
        progress = progress or SilentProgress()
        if self._process is None:
            with importing():
                target = _function(function)
            return target(**arguments, progress=progress)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _send(self._process.stdin, (function, dict(arguments)))
            while True:
                kind, value = pickle.load(self._process.stdout)
                if kind == "returned":
                    return value
                if kind == "raised":
                    error, trace = value
                    raise error from _Remote(trace)
                getattr(progress, kind)(value)
        except (EOFError, BrokenPipeError) as gone:
            code = self._process.wait()
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise GrowkitError(
                f"The process that imports torch and transformers ended with {why}.",
                "If the machine is short of memory, end other programs and begin again.",
            ) from gone


class _Remote(Exception):
    """The traceback of the worker, shown above that of this process."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"\n{trace}")


class _SentProgress(SilentProgress):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def advance(self, amount: float) -> None:
        _send(self._stream, ("advance", amount))

    def describe(self, text: str) -> None:
        _send(self._stream, ("describe", text))


def _send(stream: IO[bytes], message: tuple[str, Any]) -> None:
    stream.write(pickle.dumps(message))
    stream.flush()


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _read(stream: IO[bytes], calls: queue.Queue[Any]) -> None:
    """Pass on what is to be called; end this process when the other one has ended."""
    with contextlib.suppress(Exception):
        while True:
            calls.put(pickle.load(stream))
    os._exit(1)


def work(modules: list[str]) -> None:
    """What the other process does: import, make one call, end."""
    for one in (signal.SIGINT, *stopping_signals()):
        signal.signal(one, signal.SIG_IGN)  # the other process ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    calls: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, calls), daemon=True).start()
    with importing():
        for name in modules:
            with contextlib.suppress(Exception):  # the call will say what is missing
                importlib.import_module(name)
    gc.freeze()  # what modules consist of is looked at no more
    function, arguments = calls.get()
    try:
        returned = _function(function)(**arguments, progress=_SentProgress(answers))
        message = pickle.dumps(("returned", returned))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            message = pickle.dumps(("raised", (error, trace)))
            pickle.loads(message)
        except Exception:
            unreadable = RuntimeError(f"{type(error).__name__}: {error}")
            message = pickle.dumps(("raised", (unreadable, trace)))
    with contextlib.suppress(BrokenPipeError):
        answers.write(message)
        answers.flush()
    os._exit(0)  # nothing here is to be put away
