"""Whether a config is of the kind that a table was derived for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.families.base import Config
from growkit.families.derived.form import ACTIVATIONS, IDLE, OTHER_HEADS, is_word
from growkit.families.layer_fields import leaf


def misfit(table: Mapping[str, Any], config: Config) -> str:
    """The field in which a config is not of the kind that a table was derived for; or empty."""
    named = (config.get("architectures") or [table["class"]])[0]
    if named != table["class"] and ("kind" in table or str(named).endswith(OTHER_HEADS)):
        return "architectures"
    inner = leaf(config, tuple(table["place"]))
    if not isinstance(inner, Mapping):
        return ".".join(table["place"])
    for name, wanted in table["flags"].items():
        path = tuple(name.removeprefix("^").split("."))
        if path[-1] in IDLE:
            continue
        value = leaf(config if name.startswith("^") else inner, path)
        if value is None:
            value = table["defaults"].get(name)
        if not _suits(value, wanted, inner, table["defaults"]):
            return str(name)
    for paths in table["axes"].values():
        for name in paths:
            if leaf(inner, tuple(name.split("."))) == 0:  # Granite 4 without experts
                return str(name)
    for name, words in table["kinds"].items():
        value = inner.get(name)
        if isinstance(value, list) and not all(is_word(entry, words) for entry in value):
            return str(name)
    return ""


def _suits(value: Any, wanted: Any, inner: Config, defaults: Config) -> bool:
    """A field of a config has the value that a table was derived for, or one as good."""
    if isinstance(wanted, list):  # ["same" or "unlike", another field]
        relation, name = wanted
        other = inner.get(name, defaults.get(name))
        return bool((value is None or value == other) == (relation == "same"))
    if isinstance(value, str) and {value, wanted} <= ACTIVATIONS:
        return True
    return bool(value == wanted or (not value and not wanted))
