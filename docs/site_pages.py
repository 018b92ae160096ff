"""Hooks of mkdocs.yml: the pages of the site that are made from code, and links that leave docs/.

* ``index.md`` is README.md, ``contributing.md`` CONTRIBUTING.md, ``changes.md`` CHANGELOG.md.
* ``reference/cli.md`` is made by walking the commands, ``reference/recipes.md`` from the sections
  of the recipes (a key without a meaning under *Attributes* of its class is an error).
* ``studies/NAME.html`` is the page of a committed study, made from its ``study.json``.
* Links from a page to a file outside docs/ become links to the repository; links from README.md
  into docs/ become links between pages, so that ``mkdocs build --strict`` checks them.

Needs growkit and no torch. Run by itself it prints the generated pages.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/growkit/growkit"
BLOB = f"{REPOSITORY}/blob/main/"
RAW = "https://raw.githubusercontent.com/growkit/growkit/main/"
SITE = "https://growkit.github.io/growkit/"


# -- meanings -------------------------------------------------------------------------------------


def meanings(kind: type) -> dict[str, str]:
    """What *Attributes* of a class and of those that it derives from say of each field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        entry = re.compile(r"^ {4}(\S[^:]*): (.*(?:\n {8}.*)*)", re.MULTILINE)
        for names, meaning in entry.findall(attributes):
            said = re.sub(r"``([^`]*)``", r"`\1`", " ".join(meaning.split()))
            found |= {name.strip(): said for name in names.split(",")}
    return found


class Key(typing.NamedTuple):
    """One key of a recipe."""

    name: str
    type: str
    default: str
    meaning: str


def keys(kind: type) -> list[Key]:
    """Every key of a section (pydantic) or a request (dataclass).

    Raises:
        ValueError: a key has no meaning written in its class.
    """
    said = meanings(kind)
    rows = []
    for name, annotation, default in _fields(kind):
        if name not in said:
            raise ValueError(f"{kind.__name__}.{name} has no meaning under Attributes")
        rows.append(Key(name, kind_of(annotation), default, said[name]))
    return rows


def _fields(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Name in the file, type and default of every field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            yield field.name, hints[field.name], _default(field.default, dataclasses.MISSING)
        return
    for name, info in kind.model_fields.items():  # type: ignore[attr-defined]
        value = info.default if info.default_factory is None else info.default_factory()
        required = info.is_required()
        yield info.alias or name, hints[name], "required" if required else _default(value, None)


def _default(value: Any, missing: Any) -> str:
    if value is dataclasses.MISSING and missing is dataclasses.MISSING:
        return "required"
    if value is None:
        return ""
    if hasattr(value, "model_dump"):
        return "its defaults"
    plain = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"`{plain or value}`"


def kind_of(annotation: Any) -> str:
    """A type in words: choices, bounds, lists and the names of nested sections."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0]) + _bounds(arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_of(a) for a in arguments if a is not type(None))
    if origin is list:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        value = arguments[1]
        return f"name: {kind_of(value)}" if dataclasses.is_dataclass(value) else "mapping"
    words = {str: "text", int: "whole number", float: "number", bool: "true, false", Path: "path"}
    return words.get(annotation, f"[{getattr(annotation, '__name__', annotation)}](#x)")


def _bounds(notes: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(part, name):g}"
        for note in notes
        for part in getattr(note, "metadata", [])
        for name, sign in signs.items()
        if hasattr(part, name)
    ]
    return " " + ", ".join(found) if found else ""


# -- pages ----------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of every kind of recipe."""
    from growkit.data import recipe as data
    from growkit.study import recipe as study
    from growkit.training import recipe as training
    from growkit.training import recipe_stages as stages
    from growkit.training import recipe_training as section
    from growkit.variants.request import ConversionRequest

    parts = [
        "# Every key of a recipe",
        "Made from the code. Unknown keys are refused with the nearest valid one. `--set "
        "key.path=value` overrides a key of a training or study recipe. `growkit recipes` lists "
        "the recipes that come with growkit.",
        "## Growth recipes: `growkit grow --recipe`",
        "The keys stand under `grow`; beside it, `description`, `source` and `purpose` are texts. "
        "Sizes are `x2`, `x1.5`, `+4` or the new number.",
        _rows(growth_keys()),
    ]
    sections: list[tuple[str, list[tuple[str, type]]]] = [
        (
            "Training recipes: `growkit train`",
            [
                ("The file", training.Recipe),
                ("`model`", training.ModelSection),
                ("`tokenizer`", training.TokenizerSection),
                ("`data`", data.DataSection),
                ("`data.dataset`", data.DatasetSection),
                ("`data.mixture`, each", data.SourceSection),
                ("`data.mixture.weight`, a number or", data.WeightSection),
                ("`training`", section.TrainingSection),
                ("`training.train`, a word or", section.NewThenAll),
                ("`training.lora`", section.LoraSection),
                ("`training.samples`", section.SamplesSection),
                ("`training.early_stopping`", section.EarlyStoppingSection),
                ("`training.eval_tasks`", section.EvalTasksSection),
                ("`parallel`", section.ParallelSection),
                ("`stages`, each", stages.Stage),
                ("`stages.at`", stages.Trigger),
                ("`stages.at.plateau`", stages.Plateau),
            ],
        ),
        (
            "Study recipes: `growkit study`",
            [
                ("The file", study.StudyRecipe),
                ("`budget`", study.Budget),
                ("`arms`, each", study.Start),
                ("`bases`, each", study.Base),
                ("`compare`, each", study.Question),
                ("`sweep`", study.SweepSection),
                ("`race`", study.RaceSection),
                ("`convert` of an arm", ConversionRequest),
            ],
        ),
    ]
    anchors = {
        kind.__name__: title.replace("`", "").split(",")[0].strip()
        for _, tables in sections
        for title, kind in tables
    }
    for heading, tables in sections:
        parts.append(f"## {heading}")
        for title, kind in tables:
            parts += [f"### {title}", _table(kind)]
    text = "\n\n".join(parts) + "\n"
    return re.sub(
        r"\[(\w+)\]\(#x\)", lambda found: f"section `{anchors.get(found[1], found[1])}`", text
    )


def growth_keys() -> list[Key]:
    """Keys of ``grow``, from the table of growths that makes the flags too."""
    from growkit.surgery.operators import all_options
    from growkit.surgery.request import GrowthRequest

    defaults = {field.name: field.default for field in dataclasses.fields(GrowthRequest)}
    return [
        Key(
            option.key,
            ", ".join(f"`{value}`" for value in option.values)
            or ("size" if option.size and option.kind is str else kind_of(option.kind)),
            _default(defaults.get(option.key), None),
            option.help,
        )
        for option in all_options()
    ]


def _table(kind: type) -> str:
    return _rows(keys(kind))


def _rows(table: Iterable[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in table:
        cells = (f"`{key.name}`", key.type, key.default, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def command_page() -> str:
    """Every command with its arguments and options."""
    import typer

    from growkit.cli.app import build_app

    root = typer.main.get_command(build_app())
    parts = [
        "# Commands",
        "Made from the code; `growkit COMMAND --help` says the same. Exit codes: 0, 1 failure, 2 "
        "wrong usage, 3 failed verification, 130 Ctrl-C, 143 SIGTERM. Results go to stdout (with "
        "`--json`: one document), notes and warnings to stderr.",
    ]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        if not command.hidden:
            parts += [f"## growkit {name}", _prose(command.help or ""), _parameters(command)]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    """Help text as Markdown: examples are marked ``[dim]`` there."""
    text = inspect.cleandoc(text).replace("\b\n", "").replace("\f", "")
    text = re.sub(r"\[dim\](.*?)\[/dim\]", r"\n```bash\n\1\n```\n", text, flags=re.DOTALL)
    return re.sub(r"\[/?(?:bold|italic|cyan|green|yellow|red|dim)\]", "", text)


def _parameters(command: Any) -> str:
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = [*parameter.opts, *parameter.secondary_opts]
        argument = not names[0].startswith("-")
        shown = f"`{names[0].upper()}`" if argument else ", ".join(f"`{name}`" for name in names)
        value, default = parameter.default, ""
        if not argument and not isinstance(value, bool) and value not in (None, (), []):
            default = f"`{getattr(value, 'value', value)}`"
        meaning = _prose(getattr(parameter, "help", None) or "").replace("\n", " ")
        rows.append(
            "| " + " | ".join(c.replace("|", "\\|") for c in (shown, default, meaning)) + " |"
        )
    return "\n".join(rows)


# -- hooks ----------------------------------------------------------------------------------------

_scratch = tempfile.TemporaryDirectory()  # for the pages of the studies


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of docs/."""
    from mkdocs.structure.files import File

    from growkit.study.page import write_pages

    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changes.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "reference/recipes.md": recipe_page(),
        "reference/cli.md": command_page(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    studies = ROOT / "benchmarks" / "studies"
    for picture in sorted(studies.glob("*/*.png")):
        name = f"studies/{picture.relative_to(studies)}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    for page in write_pages(studies, Path(_scratch.name)):
        files.append(File.generated(config, f"studies/{page.name}", abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that hold on the site."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """The links of a page of docs/ (or of README.md: ``index.md``), as they have to be on the site.

    Raises:
        ValueError: a link names a file that the repository has not.
    """
    up = "../" * page.count("/")
    beside = (
        ROOT
        if page in ("index.md", "contributing.md", "changes.md")
        else ROOT / "docs" / Path(page).parent
    )

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        for prefix in (BLOB, RAW):
            if target.startswith(prefix):
                return before + inside(target.removeprefix(prefix), ROOT) + after
        if target.startswith(SITE):
            name, _, anchor = target.removeprefix(SITE).partition("#")
            name = name if name.endswith(".html") else f"{name.rstrip('/')}.md"
            return before + up + name + (f"#{anchor}" if anchor else "") + after
        if re.match(r"[a-z]+:|#", target):
            return before + target + after
        return before + inside(target, beside) + after

    def inside(target: str, folder: Path) -> str:
        name, _, anchor = target.partition("#")
        anchor = f"#{anchor}" if anchor else ""
        path = (folder / name).resolve()
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("docs/"):
            return up + relative.removeprefix("docs/") + anchor
        if relative in ("README.md", "CONTRIBUTING.md"):
            return up + {"README.md": "index.md"}.get(relative, "contributing.md") + anchor
        if relative.startswith("benchmarks/studies/") and relative.endswith(".png"):
            return up + relative.removeprefix("benchmarks/") + anchor
        if not path.exists():
            raise ValueError(f"{page} links to {target}, which is not there")
        return f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{relative}{anchor}"

    inline = re.compile(r"(\]\()([^)\s]+)(\))")
    reference = re.compile(r"(^\[[^\]]+\]: )(\S+)()", re.MULTILINE)
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(parts), 2):  # code stays as it is
        parts[index] = reference.sub(moved, inline.sub(moved, parts[index]))
    return "".join(parts)


if __name__ == "__main__":
    print(command_page(), recipe_page(), sep="\n")
