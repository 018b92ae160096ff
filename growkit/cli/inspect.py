"""``growkit inspect``: what a checkpoint is and what of it can grow."""

from __future__ import annotations

from typing import Any

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


def inspect(
    checkpoint: CheckpointArgument,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show family, axes, heads per group, lambda per layer, and what can grow. Reads headers only.

    [dim]growkit inspect ckpt/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output)
    from growkit.checkpoint import open_checkpoint
    from growkit.record.inspect import inspect_checkpoint

    with open_checkpoint(folder) as source:
        report = inspect_checkpoint(source)
    if not (json_mode or quiet):
        output.show(_table(report))
        if report.get("layers"):
            output.show(_lambdas(report["layers"]))
    output.result(report)


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    from growkit.core.quantities import counted, human_bytes, human_count

    origin = f" ({report['family_origin']})" if "family_origin" in report else ""
    table = Table(
        title=f"family {report['family']}{origin}", title_justify="left", show_header=False
    )
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for axis in report["axes"].values():
        table.add_row(axis["label"], f"{axis['size']:,}")
    heads = report.get("heads")
    if heads:
        norm = "with" if heads["sub_layer_norm"] else "without"
        table.add_row(
            "groups",
            f"{heads['groups']} of {heads['signal'] // heads['groups']} signal + "
            f"{heads['noise'] // heads['groups']} noise ({heads['ratio']}), {norm} sub-layer norm",
        )
    cost = report["cost"]
    table.add_row("embeddings", "tied" if report["tied_embeddings"] else "untied")
    table.add_row(
        "parameters",
        f"{human_count(cost['parameters'])} "
        f"({human_count(cost['non_embedding_parameters'])} without embeddings)",
    )
    table.add_row(f"FLOPs per token at {cost['context']}", human_count(cost["flops_per_token"]))
    table.add_row("KV cache per token", human_bytes(cost["kv_cache_bytes_per_token"]))
    stored = ", ".join(f"{name} {human_bytes(size)}" for name, size in report["dtypes"].items())
    table.add_row(
        "weights",
        f"{counted(report['tensors'], 'tensor')} in {counted(len(report['shards']), 'file')}: "
        f"{stored}",
    )
    if "grown_from" in report:
        table.add_row(
            "grown from", f"{report['grown_from']} ({counted(report['growths'], 'growth')})"
        )
    table.add_row("can grow by", ", ".join(report["can_grow"]))
    return table


def _lambdas(layers: list[dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table(title="lambda", title_justify="left")
    for column in ("layer", "lambda_init", "lambda"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(layers):
        table.add_row(str(index), f"{layer['lambda_init']:.4f}", f"{layer['lambda']:.4f}")
    return table
