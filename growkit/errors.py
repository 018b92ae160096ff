"""The errors a user may see: one sentence of cause, one of remedy, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class VerificationFailed(GrowkitError):
    """Two checkpoints that must compute the same function do not."""

    exit_code = 3


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'? "`` for the closest choice, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {match[0]!r}? " if match else ""
