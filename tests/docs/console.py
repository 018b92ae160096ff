"""What a console block of a page says, and how it is compared with what the commands print.

A block begins with ``$ COMMAND``; the lines below it are what a terminal of 80 columns shows,
stdout and stderr together. A line ``...`` stands for any number of lines.

The rule of comparison. Lines are compared word for word, after the folder that the test runs in has
been cut out of paths, runs of spaces and of rules have become one, and figures that vary ``#``:

1. Figures that are *measured* vary: numbers with a decimal point or an exponent, in whatever
   ``demo``, ``verify``, ``train``, ``eval`` and ``study`` print, in lines of other commands that
   begin with ``verification`` or ``passed:``, and in blocks marked ``figures``. Whole numbers
   (steps, tokens, 0) and all figures of plans are compared.
2. Seconds, dates and hashes vary everywhere.
3. Where a command runs on less than the page says (``real`` on the stand-in, ``with`` arguments),
   every number varies, and the words are compared.

A comment before the fence, ``<!-- test: MARKS -->``, says what is special:

* ``real``: the figures are those of SmolLM2-135M-Instruct. The block runs on a small model of the
  same shape, and on the real one under pytest's marker ``real``.
* ``with ARGUMENTS``: the command runs with these arguments besides, to be short.
* ``figures``: rule 1 for the whole block; ``numbers``: rule 3 for it (the folders of ``growkit
  demo`` are made in 4 steps).
* ``setup NAME``: a function of ``test_console.py`` runs first.
* ``continues``: more of the output of the block before.
* ``long (WHY)``: minutes. Runs with the arguments of ``with``, or not at all; in full, like every
  block ``with`` arguments, under the marker ``long_docs``.
* ``skip (WHY)``: does not run.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from growkit.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/data/smollm2-135m"
MEASURING = ("demo", "verify", "train", "eval", "study")
MARKS = ("real", "with", "figures", "numbers", "setup", "continues", "long", "skip")
ANY = "..."

FENCE = re.compile(
    r"(?:^<!-- test: (?P<marks>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
DECIMAL = re.compile(r"[-+]?\d[\d,]*\.\d+(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: [kMBT]\b| [kMGT]B\b)?")
VARYING = re.compile(r"\d{4}-\d\d-\d\d|\b[0-9a-f]{12,64}\b|\d+(?:\.\d+)? s\b")


@dataclass(frozen=True)
class Block:
    """One console block.

    Attributes:
        page: its file.
        line: of its fence.
        marks: the words of the comment before it, see above.
        commands: each with the lines below it.
    """

    page: Path
    line: int
    marks: dict[str, str]
    commands: list[tuple[str, list[str]]]


def fences(page: Path, kind: str) -> list[tuple[int, str, str]]:
    """(line, words of the comment, body) of every block of a kind."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("body")), found["marks"] or "", found["body"])
        for found in FENCE.finditer(text)
        if found["kind"] == kind
    ]


def blocks(page: Path) -> list[Block]:
    """The console blocks of a page."""
    return [
        Block(page, line, read_marks(marks), split_commands(body, f"{page.name}:{line}"))
        for line, marks, body in fences(page, "console")
    ]


def read_marks(text: str) -> dict[str, str]:
    """``real long (some minutes)`` as ``{"real": "", "long": "(some minutes)"}``."""
    marks: dict[str, str] = {}
    last = ""
    for word in text.split():
        if word in MARKS:
            last = word
            marks[word] = ""
        else:
            assert last, f"{text!r} begins with {word!r}, which is none of {', '.join(MARKS)}"
            marks[last] = f"{marks[last]} {word}".strip()
    for word in ("long", "skip"):
        assert marks.get(word) != "", f"{word} needs a reason in brackets"
    return marks


def split_commands(body: str, where: str) -> list[tuple[str, list[str]]]:
    """Each ``$ COMMAND`` with the lines below it; ``\\`` at the end of a line joins the next."""
    commands: list[tuple[str, list[str]]] = []
    for line in body.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif commands:
            commands[-1][1].append(line)
        else:
            commands.append(("", [line]))  # ``continues``
    assert commands, f"{where}: an empty block"
    return commands


def measuring(arguments: list[str]) -> bool:
    """Whether all that a command prints is measured (rule 1)."""
    return arguments[1:2] != [] and arguments[1] in MEASURING and "--plan" not in arguments


def words(command: str) -> list[str]:
    """The arguments of a command line, without variables, comments and ``; echo $?``."""
    parts = shlex.split(command.partition("; echo $?")[0], comments=True)
    while parts and re.fullmatch(r"[A-Z_]+=\S*", parts[0]):
        parts = parts[1:]
    return parts


def normal(line: str, folder: Path, *, measured: bool, everything: bool) -> str:
    """A line as it is compared; see the rule above."""
    for shown in (str(folder), str(folder.resolve())):
        line = line.replace(f"{shown}/", "").replace(shown, ".")
    line = VARYING.sub("#", line)
    if everything:
        line = NUMBER.sub("#", line)
    elif measured or line.lstrip().startswith(("verification", "passed:")):
        line = DECIMAL.sub("#", line)
    line = re.sub(r"([─━═])\1+", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()


def difference(documented: list[str], printed: list[str]) -> str | None:
    """None where the printed lines are what the page says; else the first line that is not."""
    groups: list[list[str]] = [[]]
    for line in documented:
        if line == ANY:
            groups.append([])
        else:
            groups[-1].append(line)
    at = 0
    for index, group in enumerate(groups):
        starts: range | list[int] = range(at, len(printed) - len(group) + 1)
        if index == 0:
            starts = [0]
        if index == len(groups) - 1 and index:
            starts = [len(printed) - len(group)]
        found = next((s for s in starts if s >= at and printed[s : s + len(group)] == group), None)
        if found is None:
            return _nearest(group, printed[at:])
        at = found + len(group)
    return None if at == len(printed) or not groups[-1] else f"more is printed: {printed[at]!r}"


def _nearest(group: list[str], printed: list[str]) -> str:
    missing = next((line for line in group if line not in printed), None)
    return f"not printed: {missing!r}" if missing else f"not in this order: {group[0]!r}"


def run(command: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command of a page, run in this process."""
    arguments, said = words(command), io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        # The lines of the log that only a slow machine prints.
        mock.patch("growkit.cli.output._LogProgress.EVERY", math.inf),
    ):
        code = main(arguments[1:]) if arguments[0] == "growkit" else _script(arguments)
        if "echo $?" in command:
            print(code)
    return code, said.getvalue().splitlines()


def _script(arguments: list[str]) -> int:
    """``cat FILE`` and ``python FILE ...``."""
    if arguments[0] == "cat":
        print(Path(arguments[1]).read_text(encoding="utf-8"))
        return 0
    assert arguments[0] == "python", arguments
    before, sys.argv = sys.argv, arguments[1:]
    try:
        runpy.run_path(arguments[1], run_name="__main__")
    finally:
        sys.argv = before
    return 0
