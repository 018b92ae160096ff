# SPDX-License-Identifier: Apache-2.0
"""Weights that are not those of a plain language model: what they are, and the remedy."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError

# Longest first; written by whom.
PREFIXES = {
    "base_model.model.": "peft (an adapter, merged or not)",
    "_orig_mod.module.": "torch.compile and DistributedDataParallel",
    "module._orig_mod.": "DistributedDataParallel and torch.compile",
    "_forward_module.": "Lightning Fabric",
    "language_model.": "a multimodal model",
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
}
_HEADS = ("score.", "classifier.", "classification_head.", "qa_outputs.", "v_head.", "value_head.")


def explain_tensors(
    expected: Collection[str], stored: Collection[str], folder: Path | None
) -> CheckpointError | None:
    """Why the stored tensors lack an expected one, where it is a known case."""
    missing = [name for name in expected if name not in stored]
    for prefix, writer in PREFIXES.items():
        if missing and any(prefix + name in stored for name in missing):
            place = "FOLDER" if folder is None else shlex.quote(str(folder))
            out = "FOLDER-plain" if folder is None else shlex.quote(f"{folder}-plain")
            return CheckpointError(
                f"The tensors begin with {prefix!r}, which {writer} puts before them.",
                f"Write a folder without it: growkit index {place} --strip-prefix {prefix} "
                f"--out {out}",
            )
    heads = sorted(name for name in stored if name.startswith(_HEADS))
    if heads and "lm_head.weight" in missing:
        return CheckpointError(
            f"The checkpoint is a classifier or a reward model: it has {heads[0]!r} and no "
            "'lm_head.weight'.",
            "Grow the language model that it was made from, and train the head again.",
        )
    return None


def explain_config(config: Mapping[str, Any], known: Collection[str]) -> UsageError | None:
    """Why a model type has no family, where the config wraps a text model."""
    for field in ("text_config", "llm_config", "language_config"):
        inner = config.get(field)
        if isinstance(inner, dict):
            kind, inside = config.get("model_type"), inner.get("model_type")
            return UsageError(
                f"{kind!r} is a wrapper, of a multimodal model as a rule: its language model is of "
                f"type {inside!r} ({field} in config.json).",
                "growkit grows the language model alone: save it with transformers as a folder of "
                f"its own ({inside}: config.json from {field}), and grow that."
                if inside in known
                else f"growkit has no family for {inside!r} either.",
            )
    return None
