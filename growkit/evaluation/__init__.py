"""Quality of one checkpoint: perplexity on text, the attention suite, tasks of lm-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.evaluation.model import LoadedModel
    from growkit.evaluation.suite import AttentionSuite

__all__ = ["attention_suite"]


def attention_suite(loaded: LoadedModel, **options: Any) -> AttentionSuite:
    """See :func:`growkit.evaluation.suite.attention_suite` (torch is imported only here)."""
    from growkit.evaluation.suite import attention_suite as measure

    return measure(loaded, **options)
