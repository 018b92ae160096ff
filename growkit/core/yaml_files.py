# SPDX-License-Identifier: Apache-2.0
"""The one YAML reader: safe types, and bounds on size, depth, aliases and digits.

A few lines of aliases that hold aliases stand for billions of values, and an alias of what it lies
in has no end; both are counted while the document is read, before a value is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from growkit.core.errors import GrowkitError, UsageError
from growkit.core.files import read_text
from growkit.core.json_files import MAX_DIGITS, is_text

MAX_YAML_BYTES = 500_000  # PyYAML reads some 200 kB/s
MAX_DEPTH = 50
MAX_NODES = 100_000
RECIPE_REMEDY = "Give the path of a YAML file; recipes/ holds examples."


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader that refuses what would not end; see the module."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # nodes of each, aliases counted as often as used

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark
            )
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            if node not in self._sizes:  # it is still being read, so the alias lies within
                raise yaml.MarkedYAMLError(
                    problem="an alias refers to the value that holds it", problem_mark=mark
                )
        else:
            self._sizes[node] = 1 + sum(self._sizes[child] for child in _children(node))
        if self._sizes[node] > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES} values, aliases counted as often as they are used",
                problem_mark=mark,
            )
        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _whole_number(loader: BoundedLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        raise yaml.MarkedYAMLError(
            problem=f"an integer of {len(node.value)} digits", problem_mark=node.start_mark
        )
    return int(loader.construct_yaml_int(node))


def _text(loader: BoundedLoader, node: yaml.ScalarNode) -> str:
    value = str(loader.construct_yaml_str(node))
    if not is_text(value):
        raise yaml.MarkedYAMLError(
            problem=f"the string {value[:40]!a} has half of a surrogate pair",
            problem_mark=node.start_mark,
        )
    return value


BoundedLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
BoundedLoader.add_constructor("tag:yaml.org,2002:str", _text)


class IncrementLoader(BoundedLoader):
    """YAML in which +8 is an increment (text), not the number 8."""


def _increment(loader: BoundedLoader, node: yaml.ScalarNode) -> int | str:
    text = str(node.value)
    return text if text.startswith("+") else _whole_number(loader, node)


IncrementLoader.add_constructor("tag:yaml.org,2002:int", _increment)


def read_yaml(
    path: Path,
    loader: type[BoundedLoader] = BoundedLoader,
    *,
    limit: int = MAX_YAML_BYTES,
    error: type[GrowkitError] = UsageError,
    remedy: str = RECIPE_REMEDY,
) -> Any:
    """The value of a YAML file, opened as :func:`growkit.core.files.open_regular` says.

    Raises:
        GrowkitError: (``error``) it cannot be read, is not UTF-8 or not YAML within the bounds.
    """
    text = read_text(path, limit=limit, error=error, remedy=remedy)
    return parse_yaml(text, str(path), loader, error=error)


def parse_yaml(
    text: str,
    source: str,
    loader: type[BoundedLoader] = BoundedLoader,
    *,
    error: type[GrowkitError] = UsageError,
) -> Any:
    """Parse YAML; a key that is given twice is refused (YAML would silently keep the last).

    Raises:
        GrowkitError: (``error``) naming ``source`` and the line.
    """
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _refuse_duplicates(node, source, error)
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as cause:  # 2026-13-45 looks like a date
        mark = getattr(cause, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(cause, "problem", None) or str(cause) or "it cannot be parsed"
        raise error(
            f"{source}{where} is not valid YAML: {problem}.", "Correct it there."
        ) from cause


def _refuse_duplicates(node: yaml.Node, source: str, error: type[GrowkitError]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise error(
                        f"{source} line {key.start_mark.line + 1} gives {key.value!r} a second "
                        "time.",
                        "Keep one of them.",
                    )
                seen.add(key.value)
            _refuse_duplicates(value, source, error)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source, error)
