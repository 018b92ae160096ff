"""Rooms ask a Family for its properties; its name is compared in families/ and variants/ alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import growkit
from growkit.families import FAMILIES

ROOT = Path(growkit.__file__).parent
# modeling/ holds the classes of our own model types, which know what they are.
MAY = ("families", "variants", "modeling")
NAMES = {name for f in FAMILIES.values() for name in (f.name, *f.model_types)}


def strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def compared(source: str) -> list[str]:
    """Names of families in comparisons, ``in`` and ``match`` included."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Compare | ast.MatchValue)]
    return [text for node in nodes for text in strings(node) if text in NAMES]


def test_no_room_compares_the_name_of_a_family() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] not in MAY
        and (names := compared(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_comparison_is_found() -> None:
    assert compared('x = family.name == "diffllama" or kind in ("gpt2", "t5")') == [
        *("diffllama", "gpt2", "t5")
    ]
