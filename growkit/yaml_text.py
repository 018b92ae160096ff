"""YAML that people write: what cannot be read is refused, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from growkit.errors import UsageError


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises UsageError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(
            f"The recipe {str(path)!r} cannot be read: {reason}.",
            "Give the path of a YAML file; recipes/ holds examples.",
        ) from error


def parse_yaml(text: str, source: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parse YAML; a key that is given twice is refused (YAML would silently keep the last).

    Raises:
        UsageError: naming ``source`` and the line.
    """
    try:
        node = yaml.compose(text, Loader=loader)
        if node is not None:
            _refuse_duplicates(node, source)
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-13-45 looks like a date
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or "it cannot be parsed"
        raise UsageError(
            f"{source}{where} is not valid YAML: {problem}.", "Correct it there."
        ) from error


class IncrementLoader(yaml.SafeLoader):
    """YAML in which +8 is an increment (text), not the number 8."""


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    text = str(node.value)
    return text if text.startswith("+") else int(loader.construct_yaml_int(node))


IncrementLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _refuse_duplicates(node: yaml.Node, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UsageError(
                        f"{source} line {key.start_mark.line + 1} gives {key.value!r} a second "
                        "time.",
                        "Keep one of them.",
                    )
                seen.add(key.value)
            _refuse_duplicates(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source)
