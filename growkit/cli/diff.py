"""``growkit diff``: what of one folder is in the other, part by part."""

from __future__ import annotations

from typing import Any

from growkit.cli.common import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    RevisionOption,
    VerboseOption,
    local_folders,
    open_output,
)

PANEL = "Look and prove"


def diff(
    a: CheckpointArgument,
    b: CheckpointArgument,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Explain a grown folder by its parent, or compare two folders tensor by tensor.

    Reads both folders once, in small blocks; no model is loaded. For a folder that growkit grew it
    says which rows and columns are old, copies or new, and checks it on the bytes: exit 3 where
    they are not what growkit.json says and no training changed them.

    [dim]growkit diff ckpt/ grown/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    a, b = local_folders((a, b), revision, output)
    from growkit.checkpoint import open_checkpoint
    from growkit.diff.folders import diff_checkpoints

    with (
        open_checkpoint(a) as first,
        open_checkpoint(b) as second,
        output.progress("compare", second.total_size) as bar,
    ):
        report = diff_checkpoints(first, second, bar.advance)
    output.show(*_lines(report))
    for note in report["notes"]:
        output.warn(note)
    output.result({"a": str(a), "b": str(b), **report})
    if report["as_grown"] is False and not (b / "growkit_training.json").is_file():
        from growkit.core.errors import VerificationFailed

        raise VerificationFailed(
            f"{b.name} is not what its growkit.json says: parts of it changed after the growth.",
            "Grow it again, or train it with growkit train, which records that it did.",
        )


def _lines(report: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    from growkit.diff.groups import span

    table = Table(title=_title(report), title_justify="left")
    table.add_column("layers")
    table.add_column("tensor", overflow="fold")
    table.add_column("how", overflow="fold")
    rows: dict[tuple[str, str], list[str]] = {}
    for group in report["groups"]:
        layers = span(group["layers"])
        if group["inserted"]:
            layers += f" (inserted, from {span(sorted(set(group['source_layers'])))})"
        stack, _, name = group["tensor"].removesuffix(".weight").rpartition("{layer}.")
        if stack.startswith(("encoder.", "decoder.")):
            name = f"{stack.split('.')[0]} {name}"
        rows.setdefault((layers, group["text"]), []).append(name)
    for (layers, text), names in rows.items():
        table.add_row(layers, ", ".join(names), text)
    return [table, *(f"growth: {summary}" for summary in report["operators"])]


def _title(report: dict[str, Any]) -> str:
    if report["mode"] == "tensors":
        return "A and B are identical" if report["identical"] else "A and B, tensor by tensor"
    if report["as_grown"]:
        return "B is A, grown; every part is what its plan says"
    return "B was grown from A and has changed since"
