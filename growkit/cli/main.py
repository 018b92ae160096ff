"""SIGTERM and SIGHUP end a command the way Ctrl-C does: what it was writing is cleaned away.

Entry point, and the one place where an exception becomes a sentence.

Everything else is imported inside :func:`main`, so that Ctrl-C finds its sentence from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from growkit.core.process import leave_terminal, stopping_signals

if TYPE_CHECKING:
    from growkit.core.errors import GrowkitError

# Commands that derive a table where none is for the model.
DERIVING = ("plan", "inspect", "grow", "verify", "diff")


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Raise SystemExit in the main thread on SIGTERM or SIGHUP, so that every ``finally`` runs.

    Schedulers send SIGTERM some time before SIGKILL; a second one during the cleaning is ignored.
    A command may take the signal over for a while and then gives it back (training does).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        if number != signal.SIGTERM:
            leave_terminal()
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    for one in stopping_signals():
        before[one] = signal.signal(one, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(error: BaseException) -> tuple[str, str, int] | None:
    """(cause, remedy, exit code) of an error that we can explain, or None."""
    from growkit.core.errors import GrowkitError

    if isinstance(error, GrowkitError):
        return error.cause, error.remedy, error.exit_code
    if isinstance(error, OSError):
        from growkit.core.os_errors import explained

        said = explained(error)
        return said.cause, said.remedy, said.exit_code
    if isinstance(error, MemoryError):
        return (
            "There is not enough memory for this.",
            "End other programs, or use fewer threads.",
            1,
        )
    return None


def _said_elsewhere(error: GrowkitError) -> bool:
    """Whether another process of the same launch says it: every process finds a wrong usage."""
    from growkit.core.errors import FailedElsewhere, RunStopped, UsageError

    later = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
    return isinstance(error, FailedElsewhere) or (
        later and isinstance(error, UsageError | RunStopped)
    )


# What Ctrl-C leaves of a command, and so what its repetition does.
AGAIN = {
    "train": "to continue from the last checkpoint",
    "study": "to continue (finished runs stay, the others continue from their last checkpoint)",
    "demo": "to continue",
    "grow": "nothing was written; to begin again",
    "convert": "nothing was written; to begin again",
}


def _again(given: list[str]) -> str:
    """The line that says how to resume, or nothing; of several processes the launcher knows it."""
    if not given or given[0] not in AGAIN or "RANK" in os.environ:
        return ""
    import shlex

    words = list(given)
    if given[0] in ("train", "demo"):  # these would throw away what is to be continued
        words = [word for word in words if word != "--overwrite"]
        for i, word in enumerate(words):
            if word == "--resume" and words[i + 1 : i + 2] == ["never"]:
                del words[i : i + 2]
        words = [word for word in words if word != "--resume=never"]
    return f"{AGAIN[given[0]]}: {shlex.join(['growkit', *words])}"


def _run(build_app: Callable[[str | None], Any], given: list[str]) -> None:
    """Run the command; where no table is for its model, derive one and run it again."""
    from growkit.core.errors import GrowkitError

    command = given[0] if given else None
    try:
        build_app(command)(args=given, standalone_mode=True)
    except GrowkitError as error:
        from growkit.families import NoFamily

        if not isinstance(error, NoFamily) or command not in DERIVING:
            raise
        from growkit.cli import common
        from growkit.cli.derive import derive_once
        from growkit.derive.derivation import OldForm

        try:
            derive_once(error.config, common.current)
        except OldForm:
            raise
        except GrowkitError as reason:
            own = "auto_map" in error.config  # its remedy says how to run the folder's code
            remedy = error.meant + reason.remedy if own else error.remedy
            raise NoFamily(f"{error.cause} {reason.cause}", remedy, error.config) from reason
        build_app(command)(args=given, standalone_mode=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0, 1 failure, 2 usage, 3 verification, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from growkit.cli.app import build_app
        from growkit.core.process import wait_passively

        wait_passively()
        with terminated_in_order():
            asked = ["--overwrite-all" if word == "--overwrite=all" else word for word in given]
            if asked[:1] == ["help"]:  # growkit help COMMAND
                asked = [*asked[1:], "--help"]
            _run(build_app, asked)
    except (SystemExit, KeyboardInterrupt) as stop:
        # typer turns Ctrl-C within a command into SystemExit(130)
        exit_code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if exit_code in (129, 130, 143):
            if again := _again(given):
                print(again, file=sys.stderr)
            print("interrupted" if exit_code == 130 else "terminated", file=sys.stderr)
        return exit_code if isinstance(exit_code, int) else 0
    except Exception as error:
        import typer

        from growkit.cli import common
        from growkit.core.errors import GrowkitError, RunStopped
        from growkit.core.printed_text import printable

        if isinstance(error, GrowkitError) and _said_elsewhere(error):
            return error.exit_code
        verbose = common.current is not None and common.current.verbose
        known = _describe(error)
        if known is None or verbose:
            import traceback

            typer.echo(printable(traceback.format_exc(), keep="\n"), err=True, nl=False)
        if known is None:
            typer.echo("error: unexpected failure, see above.", err=True)
            return 1
        cause, remedy, code = printable(known[0]), printable(known[1]), known[2]
        stopped = isinstance(error, RunStopped)
        label, color = ("stopped: ", "yellow") if stopped else ("error: ", "red")
        typer.secho(label, fg=color, err=True, nl=False)
        typer.echo(f"{cause}\n       {remedy}" if remedy else cause, err=True)
        if stopped and (again := _again(given)):
            typer.echo(printable(again), err=True)
        return code
    return 0


def run() -> None:
    """The console script."""
    code = main()
    if code in (129, 130, 143):
        # All is cleaned away: wait for no thread that the signal found in the middle of something.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
