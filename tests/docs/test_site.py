"""The pages that are made from code, and the links of README.md and docs/, without mkdocs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

from growkit.recipe.section import Section
from growkit.study.recipe import StudyRecipe
from growkit.surgery.request import GrowthRequest
from growkit.training.recipe import Recipe
from growkit.variants.request import ConversionRequest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
REPOSITORY = re.compile(
    r"https://(?:github\.com/growkit/growkit/(?:blob|tree)|"
    r"raw\.githubusercontent\.com/growkit/growkit)/main/([^\s)#]+)"
)


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(kind: type, found: set[type]) -> set[type]:
    """Every section that a recipe may hold, at any depth."""

    def visit(annotation: Any) -> None:
        known = isinstance(annotation, type) and issubclass(annotation, Section)
        if known and annotation not in found:
            sections(annotation, found)
        for part in get_args(annotation):
            visit(part)

    found.add(kind)
    for annotation in get_type_hints(kind, include_extras=True).values():
        visit(annotation)
    return found


def test_every_recipe_key_has_a_meaning_and_stands_on_the_page(site: ModuleType) -> None:
    page = site.recipe_page()
    kinds = sections(Recipe, set()) | sections(StudyRecipe, set())
    assert len(kinds) >= 18
    grow = {key.name for key in site.growth_keys()}
    assert grow >= {field.name for field in dataclasses.fields(GrowthRequest)}
    assert all(key.meaning and f"| `{key.name}` |" in page for key in site.growth_keys())
    for kind in [*kinds, ConversionRequest]:
        for key in site.keys(kind):
            assert key.meaning[-1] == ".", f"{kind.__name__}.{key.name}"
            if kind.__name__ != "Position":  # written by growkit, not by a user
                assert f"| `{key.name}` | {key.type.split('[')[0]}" in page.replace(
                    "section ", "["
                ), key


def test_a_key_without_a_meaning_is_an_error(site: ModuleType) -> None:
    class Undocumented(Section):
        """One of two.

        Attributes:
            known: it is.
        """

        known: int = 0
        unknown: int = 0

    with pytest.raises(ValueError, match=r"Undocumented\.unknown has no meaning"):
        site.keys(Undocumented)


def test_every_command_and_option_stands_on_the_page(site: ModuleType) -> None:
    import typer

    from growkit.cli.app import build_app

    page, root = site.command_page(), typer.main.get_command(build_app())
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        assert f"## growkit {name}\n" in page
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=lambda path: path.name)
def test_links_name_what_is_there(site: ModuleType, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}.get(path.name)
    if path not in FRONT or name:
        site.site_links(text, name or path.relative_to(ROOT / "docs").as_posix())
    for target in REPOSITORY.findall(text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\(([^):\s#]+)[)#]", re.sub(r"```.*?```", "", text, flags=re.S)):
        assert (path.parent / target).exists(), target


def test_every_page_stands_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in PAGES:
        assert f": {path.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_the_long_description_links_to_the_repository() -> None:
    """A package page shows README.md without the repository beside it."""
    import runpy

    text = runpy.run_path(str(ROOT / "setup.py"))["absolute_links"](FRONT[0].read_text("utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets), targets
    assert text.count("![") == len(re.findall(r"!\[[^\]]*\]\(https://raw\.", text)) == 2
    assert len(FRONT[0].read_text("utf-8").splitlines()) <= 200


def test_contributing_names_the_rooms_of_the_contract() -> None:
    if sys.version_info < (3, 11):
        import tomli as tomllib
    else:
        import tomllib
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    rooms = [layer.removeprefix("growkit.") for layer in reversed(contracts[0]["layers"])]
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert f"`{' -> '.join(rooms)}`" in text


def test_commands_of_the_tests_are_those_that_ci_runs() -> None:
    """README.md's word for word; CONTRIBUTING.md's in an activated environment."""
    run = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    active = [line.replace(".venv/bin/", "").replace("--quiet ", "") for line in run]
    for page, lines in (("README.md", run), ("CONTRIBUTING.md", [*active, ". activate"])):
        text = (ROOT / page).read_text(encoding="utf-8")
        first = re.findall(r"```bash\n([^`]*pytest -n[^`]*)```", text)[0]
        for command in first.strip().replace("\n", " && ").split(" && "):
            assert command.replace(". .venv/bin/", ". ") in lines, command


WORKFLOWS = [".ci/run", *(str(p.relative_to(ROOT)) for p in ROOT.glob(".github/workflows/*.yml"))]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_files_that_ci_reads_exist(workflow: str) -> None:
    """No service runs them here, so that a renamed file would be missed by users alone."""
    text = (ROOT / workflow).read_text(encoding="utf-8")
    for name in re.findall(r"\.ci/[\w.-]+|constraints[\w-]*\.txt", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("selection", [".ci/newest_versions.txt", ".ci/oldest_versions.txt"])
def test_selections_for_other_versions_name_tests(selection: str) -> None:
    for name in (ROOT / selection).read_text(encoding="utf-8").split():
        assert (ROOT / name).exists(), name
