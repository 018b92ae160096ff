"""Every console block of README.md and docs/ runs and prints what it says; see ``console.py``.

Commands run in this process, page by page, each page in a folder of its own with what its blocks
name: the folders that ``growkit demo`` leaves, recipes, a committed study, and
SmolLM2-135M-Instruct (its config for ``plan``, a stand-in of the same shape for the rest).
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import console
import pytest
from console import CONFIG, ROOT, Block, blocks, fences, run, words

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SPOKEN = [page for page in PAGES if fences(page, "console")]
SHELL = [page for page in PAGES if fences(page, "bash")]
SMOLLM2 = ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")


def pages_with(*marks: str) -> list[Path]:
    return [page for page in SPOKEN if any({*marks} & b.marks.keys() for b in blocks(page))]


def give_smollm2(place: Path, folder: Path) -> None:
    for name in SMOLLM2:
        with contextlib.suppress(FileNotFoundError):
            (place / name).unlink()
        (place / name).symlink_to(folder, target_is_directory=True)


def broken(place: Path) -> None:
    """A grown folder with 16 weights of one o_proj doubled."""
    import numpy as np

    from growkit.checkpoint import open_checkpoint

    growth = "--signal-heads x2 --layers +2 --ffn x1.5 --out checkpoints/grown --no-verify"
    assert run(f"growkit grow checkpoints/demo/base {growth}")[0] == 0
    shutil.copytree(place / "checkpoints/grown", place / "checkpoints/broken")
    with open_checkpoint(place / "checkpoints/broken") as checkpoint:
        info = checkpoint.tensors["model.layers.0.self_attn.o_proj.weight"]
    with open(place / "checkpoints/broken" / info.shard, "r+b") as file:
        file.seek(info.start)
        weights = np.frombuffer(file.read(64), dtype=np.float32)
        file.seek(info.start)
        file.write((2 * weights).tobytes())


def code(place: Path) -> None:
    """``code.txt``: a part of the modules that the page names."""
    text, modules = "", sorted(Path(contextlib.__file__).parent.glob("*.py"))
    while len(text) < 1_200_000:
        text += modules.pop(0).read_text(encoding="utf-8")
    (place / "code.txt").write_text(text, encoding="utf-8")


def corpus(place: Path) -> None:
    """A folder of text."""
    (place / "corpus").mkdir()
    (place / "corpus/text.txt").write_text("Some text.\n" * 1000, encoding="utf-8")


SETUPS: dict[str, Callable[[Path], None]] = {"broken": broken, "code": code, "corpus": corpus}


def runs(block: Block, how: str) -> bool:
    """Whether a block runs in a mode: ``short``, ``real`` or ``long`` (everything, in full)."""
    marks = block.marks
    if how == "short":
        return "skip" not in marks and ("long" not in marks or "with" in marks)
    if how == "real":
        return "real" in marks and not {"long", "skip"} & marks.keys()
    return "skip" not in marks


def output(command: str, block: Block, how: str, said: list[str] | None) -> list[str]:
    """What a command of a page prints; that of ``growkit demo`` is there already."""
    if said is not None and words(command)[:2] == ["growkit", "demo"]:
        return said
    besides = block.marks.get("with", "") if how == "short" else ""
    code, lines = run(f"{command} {besides}".strip())
    shown = [line for given, lines in block.commands if given == command for line in lines]
    failing = any(line.startswith("error:") for line in shown)
    assert (code != 0) == failing, f"$ {command}\nended with {code}:\n" + "\n".join(lines)
    return lines


def check(page: Path, place: Path, how: str, smollm2: Path, said: list[str] | None = None) -> None:
    """Run the blocks of a page, in order, and compare each with what it printed."""
    printed: list[str] = []
    for block in blocks(page):
        if not runs(block, how):
            continue
        if "setup" in block.marks:
            SETUPS[block.marks["setup"]](place)
        changed = how == "short" and bool({"real", "with", "numbers"} & block.marks.keys())
        for command, documented in block.commands:
            if "continues" not in block.marks:
                # A plan needs the config alone, so its figures are those of the real model.
                plan = words(command)[1:2] == ["plan"]
                give_smollm2(place, CONFIG if plan else smollm2)
                printed = output(command, block, how, said)
            measured = "figures" in block.marks or console.measuring(words(command))
            wrong = console.difference(
                *(
                    [
                        console.normal(line, place, measured=measured, everything=changed)
                        for line in lines
                    ]
                    for lines in (documented, printed)
                )
            )
            if wrong is not None:
                shown = "\n".join(printed)
                pytest.fail(f"{page.name}:{block.line}: $ {command}\n{wrong}\n\n{shown}")


@pytest.mark.parametrize("page", SPOKEN, ids=lambda page: page.name)
def test_the_blocks_of_a_page_print_what_they_say(
    page: Path, place: Path, demo: tuple[Path, list[str]], stand_in: Path
) -> None:
    said = [line.replace(str(demo[0]), str(place)) for line in demo[1]]
    check(page, place, "short", stand_in, said)


@pytest.mark.real
def test_blocks_of_the_real_model_on_the_front_page(place: Path, smollm2: Path) -> None:
    check(ROOT / "README.md", place, "real", smollm2)


@pytest.mark.real
@pytest.mark.long_docs
@pytest.mark.parametrize("page", pages_with("real"), ids=lambda page: page.name)
def test_blocks_of_the_real_model(page: Path, place: Path, smollm2: Path) -> None:
    check(page, place, "real", smollm2)


@pytest.mark.long_docs
@pytest.mark.parametrize("page", pages_with("long", "with"), ids=lambda page: page.name)
def test_pages_with_blocks_that_take_minutes(page: Path, place: Path, smollm2: Path) -> None:
    shutil.rmtree(place / "checkpoints") if page.name in ("README.md", "start.md") else None
    check(page, place, "long", smollm2)


@pytest.mark.parametrize("page", SHELL, ids=lambda page: page.name)
def test_commands_of_shell_blocks_parse(page: Path) -> None:
    """Commands without shown output: names of commands and flags exist."""
    import typer

    from growkit.cli.app import build_app

    root = typer.main.get_command(build_app())
    for line, _, body in fences(page, "bash"):
        for command in body.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|-m )growkit (.*)", command.partition(" # ")[0].strip())
            if found is None:
                continue
            name, *arguments = words(found[1])
            known = root.commands[name]  # type: ignore[attr-defined]
            try:
                known.make_context(name, arguments)
            except Exception as error:
                pytest.fail(f"{page.name}:{line}: {command}: {error}")


def test_a_stale_line_is_found() -> None:
    said = ["a b", "c 1.5", "d", "e"]
    assert console.difference(["a b", "...", "e"], said) is None
    assert console.difference(["...", "c 1.5", "..."], said) is None
    assert "'c 1.6'" in str(console.difference(["...", "c 1.6", "..."], said))
    assert "more is printed" in str(console.difference(["a b", "c 1.5"], said))
    assert console.difference(["...", "d"], said) is not None
    assert console.difference(["d", "..."], said) is not None
    line = "verification passed: max |d logit| 2.32e-06, 512 tokens"
    here = Path("/nowhere")
    assert "512" in console.normal(line, here, measured=False, everything=False)
    assert "#" in console.normal(line, here, measured=False, everything=False)
    assert "#" not in console.normal("│ parameters │ 2.5 M", here, measured=False, everything=False)


def test_every_console_block_begins_with_a_command() -> None:
    for page in SPOKEN:
        for block in blocks(page):
            assert block.commands[0][0] or "continues" in block.marks, f"{page.name}:{block.line}"
        text = page.read_text(encoding="utf-8")
        assert "```\n$ " not in text, f"{page.name}: a block with commands is marked console"
