"""The rooms in the data's way: no room imports one after it, and no files import in a circle."""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture
def graph() -> grimp.ImportGraph:
    """Every import of the package, those under TYPE_CHECKING and inside functions too."""
    found = grimp.build_graph("growkit", cache_dir=None)
    # Not the face of the package, with its version and the Python interface.
    for name in found.find_modules_directly_imported_by("growkit"):
        found.remove_import(importer="growkit", imported=name)
    return found


def layers() -> list[str]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract: list[str] = content["tool"]["importlinter"]["contracts"][0]["layers"]
    return contract


def upward(graph: grimp.ImportGraph) -> list[str]:
    found = graph.find_illegal_dependencies_for_layers(layers=layers())
    return [f"{chain.importer} imports {chain.imported}" for chain in found]


def circle(graph: grimp.ImportGraph) -> list[str]:
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_place_in_the_contract(graph: grimp.ImportGraph) -> None:
    rooms = {name for name in graph.modules if name.count(".") == 1}
    assert rooms == {*layers(), "growkit.__main__"}


def test_no_room_imports_one_that_comes_after_it(graph: grimp.ImportGraph) -> None:
    assert upward(graph) == []


def test_no_files_import_in_a_circle(graph: grimp.ImportGraph) -> None:
    assert circle(graph) == []


def test_an_upward_import_and_a_circle_are_found(graph: grimp.ImportGraph) -> None:
    graph.add_import(importer="growkit.surgery.amount", imported="growkit.cli.grow")
    assert upward(graph)
    graph.add_import(importer="growkit.core.errors", imported="growkit.core.files")
    assert circle(graph)
