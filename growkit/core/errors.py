"""The errors a user may see: one sentence of cause, one of remedy, and an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any


class GrowkitError(Exception):
    """Something failed for a reason that we can explain.

    Args:
        cause: one sentence that quotes the offending value.
        remedy: one sentence that says what to do instead, with the valid choices.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy


class UsageError(GrowkitError):
    """The request itself cannot be carried out (wrong option, value or combination)."""

    exit_code = 2


class CheckpointError(GrowkitError):
    """A checkpoint folder cannot be read or is damaged."""


class Diverged(GrowkitError):
    """A loss or a gradient norm became NaN or infinite."""


class VerificationFailed(GrowkitError):
    """Two checkpoints that must compute the same function do not."""

    exit_code = 3


class FailedElsewhere(GrowkitError):
    """Another process of the same run failed, and says why; this one only ends."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("Another process of this run failed.", "Its own message says why.")
        self.exit_code = exit_code


class RunStopped(GrowkitError):
    """A signal asked the run to stop; its state is saved and the same command continues."""

    exit_code = 143  # 128 + SIGTERM, as the shell reports it; 129 after SIGHUP


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'? "`` for the closest choice, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {match[0]!r}? " if match else ""


def nearest_version(word: str, choices: Iterable[str]) -> str:
    """The same for names whose numbers tell versions apart: qwen3_5 is no misspelt qwen3."""
    numbers = re.findall(r"\d+", word)
    near = difflib.get_close_matches(word.lower(), list(choices), n=3, cutoff=0.85)
    same = [name for name in near if re.findall(r"\d+", name) == numbers]
    return f"Did you mean {same[0]!r}? " if same else ""


def require_extra(module: str, library: str, extra: str, what: str) -> None:
    """Raise UsageError unless the library of an optional extra is installed; nothing is imported.

    Args:
        module: that the library brings.
        library: its name in words.
        extra: of growkit, that installs it.
        what: needs it, as the subject of the sentence.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f"{what} needs {library}, which is not installed.",
            f"Run: pip install 'growkit[{extra}]'.",
        )


def shown(value: Any, limit: int = 80) -> str:
    """``repr`` of a value from a file, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def check_keys(
    values: Iterable[object], known: Collection[str], whose: str, place: str = ""
) -> None:
    """Raise UsageError for a key that is not known; the nearest one and all of them are named.

    Args:
        values: the keys that were given.
        known: those that there are.
        whose: who has them, as the subject of the sentence: ``The recipe``.
        place: where, as its end: `` under 'grow'``.
    """
    for key in values:
        if key not in known:
            raise UsageError(
                f"{whose} has an unknown key {key!r}{place}.",
                f"{nearest(str(key), known)}Valid keys: {', '.join(known)}.",
            )
