"""``growkit eval``: perplexity on text, the attention suite, tasks of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from growkit.cli.common import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    RevisionOption,
    VerboseOption,
    local_folder,
    open_output,
)

PANEL = "Look and prove"
SUITE = "Attention suite"


def eval(
    checkpoint: CheckpointArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files, each scored by itself; default: a built-in sample."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: half a window.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, with commas: hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of lm-eval tasks.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt of a task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of a task that run at once.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only so many examples a task.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="attention: needle retrieval, noise in context, attention entropy, outlier "
            "activations, on the texts given or the built-in sample.",
            rich_help_panel=SUITE,
        ),
    ] = None,
    forms: Annotated[
        str,
        typer.Option(
            help="Needles: city (magic numbers), copy (random tokens) or both.",
            rich_help_panel=SUITE,
        ),
    ] = "city,copy",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts.", rich_help_panel=SUITE)
    ] = "128,256",
    needles: Annotated[int, typer.Option(help="Needles in a context.", rich_help_panel=SUITE)] = 4,
    queries: Annotated[
        int, typer.Option(help="Needles of a context that are asked for.", rich_help_panel=SUITE)
    ] = 2,
    samples: Annotated[
        int, typer.Option(help="Questions at each length and depth.", rich_help_panel=SUITE)
    ] = 20,
    seed: Annotated[
        int, typer.Option(help="Of needles and their places.", rich_help_panel=SUITE)
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on the CPU), float32, bfloat16, float16 or float64.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that the folder brings.")
    ] = False,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a checkpoint: perplexity and bits per byte on text, attention, lm-eval tasks.

    [dim]growkit eval grown/ --text held_out.txt --suite attention[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output)
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else []
    from growkit.evaluation.harness import check_installed, run_tasks
    from growkit.evaluation.model import load
    from growkit.evaluation.perplexity import score_text
    from growkit.samples import sample_text
    from growkit.verification.loading import quiet_transformers

    if names:
        check_installed()
    options = None
    if suite is not None:
        from growkit.cli.eval_suite import suite_options

        options = suite_options(
            suite, forms, lengths, needles=needles, queries=queries, samples=samples, seed=seed
        )
    texts = named_texts(text or [])
    if not texts and not names and options is None:
        texts = {"built-in sample": sample_text()[:200_000]}
    loaded = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    scores = {}
    for name, content in texts.items():
        # About four characters a token; the bar need not be exact.
        with output.progress(name, len(content) // 4, unit="tokens") as bar:
            scores[name] = score_text(loaded, content, window=window, stride=stride, progress=bar)
    measured: dict[str, dict[str, Any]] = {}
    if names:
        with quiet_transformers():
            measured = run_tasks(
                loaded,
                names,
                include_path=include_path,
                fewshot=fewshot,
                batch_size=batch_size,
                limit=limit,
            )
    attention = None
    if options is not None:
        from growkit.cli.eval_suite import run_suite

        attention = run_suite(loaded, "\n\n".join(texts.values()) or None, options, output)
    if scores:
        output.show(_score_table(scores))
    if measured:
        output.show(_task_table(measured))
    output.result(
        {
            "checkpoint": str(checkpoint),
            "device": str(loaded.device),
            "dtype": loaded.dtype,
            "texts": {name: asdict(score) for name, score in scores.items()},
            "tasks": measured,
            "suites": {} if attention is None else {"attention": attention.as_dict()},
        }
    )


def named_texts(paths: list[Path]) -> dict[str, str]:
    """Texts by file name, or by the whole path where two files have the same name."""
    from growkit.verification.windows import read_text

    names = [path.name for path in paths]
    return {
        path.name if names.count(path.name) == 1 else str(path): read_text(path) for path in paths
    }


def _score_table(scores: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="perplexity", title_justify="left")
    table.add_column("text")
    for heading in ("tokens", "loss (nats)", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        figures = (score.loss, score.perplexity, score.bits_per_byte)
        table.add_row(name, f"{score.tokens:,}", *(f"{figure:.4f}" for figure in figures))
    return table


def _task_table(measured: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="lm-evaluation-harness", title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    table.add_column("value", justify="right")
    for task, metrics in measured.items():
        for name, value in metrics.items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(task, name, shown)
    return table
