"""Option types that several commands share, and the sink that each command opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from growkit.cli.output import Output

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder of a Hugging Face checkpoint (config.json + safetensors), or its Hub id "
        "(org/name), which is downloaded."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id; default: main.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show tracebacks and more detail.")
]

ADVICE = "Advice"
TokensPerSecondOption = Annotated[
    float | None,
    typer.Option(
        min=1e-9, help="Throughput of the whole job, for the hours.", rich_help_panel=ADVICE
    ),
]
FlopsPerSecondOption = Annotated[
    float | None,
    typer.Option(
        min=1e-9,
        help="FLOPs that all processes achieve together (4e14), for the hours.",
        rich_help_panel=ADVICE,
    ),
]

OUTPUT_PANEL = "Output"
OutOption = Annotated[
    Path,
    typer.Option(
        "--out", "-o", "--output-dir", help="Folder to write.", rich_help_panel=OUTPUT_PANEL
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an existing checkpoint once the new one is whole (not one with files of "
        "other programs: --overwrite=all).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
# An option with a value that may be left out would swallow the argument after it, so that
# ``--overwrite=all`` is rewritten to this flag before it is parsed (growkit.cli.main).
OverwriteAllOption = Annotated[
    bool,
    typer.Option(
        "--overwrite-all",
        help="The same as --overwrite=all: delete files of other programs too.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
NoVerifyOption = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Do not compare the written folder with the source (the card says so).",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
ShardSizeOption = Annotated[
    str, typer.Option(help="Largest shard, in bytes with a unit.", rich_help_panel=OUTPUT_PANEL)
]


def complete_recipe(
    kind: str | None = None, more: tuple[str, ...] = ()
) -> Callable[[str], list[str]]:
    """Completion in the shell: the shipped recipes of a kind (files complete as ever)."""

    def complete(incomplete: str) -> list[str]:
        from growkit.recipe.shipped import recipe_names

        return [name for name in [*recipe_names(kind), *more] if name.startswith(incomplete)]

    return complete


def complete_words(*words: str) -> Callable[[str], list[str]]:
    """Completion in the shell: one of a few words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def open_output(json_mode: bool, quiet: bool, verbose: bool) -> Output:
    """The sink of this run; remembered so that the error handler prints the same way."""
    global current
    current = Output(json_mode=json_mode, quiet=quiet, verbose=verbose)
    return current


def local_folder(
    source: Path, revision: str | None, output: Output, *, weights: bool = True
) -> Path:
    """The folder of a source; a Hub id is downloaded (without ``weights``: its config alone)."""
    from growkit.checkpoint.hub import resolve_source

    progress = output.stderr.is_terminal and not (output.json_mode or output.quiet)
    folder = resolve_source(source, revision, weights=weights, progress=progress)
    if folder != source:
        output.note(f"{source} from the Hub: {folder}")
    return folder


def local_folders(
    sources: tuple[Path, Path], revision: str | None, output: Output
) -> tuple[Path, Path]:
    """Two folders; ``revision`` is of those that are Hub ids."""
    local = [source.exists() for source in sources]
    a, b = (
        local_folder(source, None if here and not all(local) else revision, output)
        for source, here in zip(sources, local, strict=True)
    )
    return a, b


def wrote(out: Path, manifest: dict[str, Any]) -> str:
    """The line that says what became of the folder."""
    if manifest.get("already_there"):
        return f"{out} was there already, whole, from the same command: nothing was left to do"
    return f"wrote {out}"


def next_steps(out: Path, manifest: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The last line of a growth: the command that trains the folder on.

    ``config``: what was written, as the plan has it; nothing is read again, so that a hint cannot
    make a failure of a written folder.
    """
    import shlex

    from growkit.families import is_encoder

    plan = manifest["plan"]
    if "decoder_layer" in plan["axes"] or is_encoder(config):  # training is for decoders
        return []
    return [f"next: growkit recipes new-run {shlex.quote(str(out))} --text YOUR_TEXT"]


current: Output | None = None
