"""Tasks of lm-evaluation-harness (EleutherAI/lm-evaluation-harness, the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, nearest, require_extra
from growkit.evaluation.model import LoadedModel


def check_installed(what: str = "--tasks") -> None:
    """Raises UsageError when the harness is not installed; ``what`` asks for it."""
    require_extra("lm_eval", "lm-evaluation-harness", "eval", what)


def run_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    fewshot: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as the harness reports them, and the number of ``samples``.

    Args:
        tasks: names of tasks; local ones stand as YAML files in ``include_path`` and need no
            network.
        limit: examples a task, for a quick look.

    Raises:
        UsageError: the harness is not installed, or a task is not known.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading the harness's own thousands of tasks takes 15 s; local ones need none of them.
    manager = TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path is None,
    )
    if include_path is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            raise UsageError(
                f"Task {task!r} is not known to lm-evaluation-harness.",
                f"{nearest(task, manager.all_tasks)}Local tasks are found by --include-path.",
            )
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        task: {
            # the number of examples stands beside the metrics, each of which is "name,filter"
            **({"samples": metrics["sample_len"]} if "sample_len" in metrics else {}),
            **{
                name.removesuffix(",none"): value
                for name, value in metrics.items()
                if "," in name and "stderr" not in name
            },
        }
        for task, metrics in results["results"].items()
    }
