"""Experiment trackers of ``training.report_to``: transformers' own integrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, nearest


def check_trackers(names: Sequence[str]) -> None:
    """Refuse an unknown tracker, and one whose library is not installed, before any work.

    Raises:
        UsageError: with the trackers that could be used.
    """
    if not names:
        return
    from transformers.integrations import integration_utils

    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise UsageError(
                f"training.report_to names the tracker {name!r}, which transformers does not know.",
                f"{nearest(name, known)}Known: {', '.join(known)}.",
            )
        if name not in installed:
            extra = "'growkit[trackers]'" if name == "tensorboard" else name
            raise UsageError(
                f"training.report_to names the tracker {name!r}, which is not installed.",
                f"Run: pip install {extra}. Installed: {', '.join(installed) or 'none'}.",
            )


def log_beside(callbacks: Sequence[Any], folder: Path) -> None:
    """Let TensorBoard write into ``folder``, unless TENSORBOARD_LOGGING_DIR says where."""
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder)
