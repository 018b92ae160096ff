"""``growkit tokenizer extend``: more tokens for a new language or domain, behind the old ones."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import (
    JsonOption,
    OutOption,
    QuietOption,
    VerboseOption,
    open_output,
)

PANEL = "Grow"


class Action(str, Enum):
    """What is done with a tokenizer."""

    extend = "extend"


def tokenizer(
    action: Annotated[Action, typer.Argument(help="extend: learn further merges on a text.")],
    base: Annotated[Path, typer.Argument(help="Folder with the tokenizer.json to extend.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text of the new domain: files, folders or patterns; repeatable."),
    ],
    out: OutOption,
    new: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 8000,
    limit: Annotated[str, typer.Option(help="Read at most so much text.")] = "200MB",
    text_field: Annotated[str, typer.Option(help="Field of .jsonl and .parquet.")] = "text",
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Extend a byte-pair tokenizer: old tokens keep their ids, new merges come behind the old.

    Then grow the model into it: growkit grow CKPT --tokenizer OUT --out GROWN.

    [dim]growkit tokenizer extend ckpt/ --text corpus/ --new 8000 --out tok/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    import shlex
    from dataclasses import asdict

    from growkit.checkpoint.publish import staged_output
    from growkit.checkpoint.shards import parse_size
    from growkit.data.text_files import find_files, read_documents
    from growkit.data.tokenizer_extension import extend_tokenizer

    files = find_files(text)
    documents = (document for file in files for document in read_documents(file, text_field))
    with (
        staged_output(out, overwrite=False, needed_bytes=32_000_000, sources=[base]) as folder,
        output.progress("read", None) as bar,
    ):
        done = extend_tokenizer(
            base, documents, new, folder, limit=parse_size(limit), advance=bar.advance
        )
    output.show(done.summary, f"wrote {out}")
    output.show(f"next: growkit grow CKPT --tokenizer {shlex.quote(str(out))} --out GROWN")
    output.result({"out": str(out), **asdict(done), "summary": done.summary})
