"""A tower of a multimodal folder (vision, audio) as a family of its own: all else is copied.

What grows of a tower is what its class alone was derived and proven for, from pixels or sound: the
table of its model type, read with its config's place in the whole config and with its tensors'
beginning in the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkit.core.errors import CheckpointError, UsageError, nearest
from growkit.families.base import Config, Family
from growkit.families.derived.family import read_with
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import tables_of

TEXT = ("text", "llm", "language")


def parts_of(config: Config) -> dict[str, str]:
    """Name of a part -> config field that describes it, of the parts that are models."""
    return {
        name.removesuffix("_config"): name
        for name, value in config.items()
        if name.endswith("_config") and isinstance(value, Mapping) and "model_type" in value
    }


def tower_field(config: Config, part: str) -> str:
    """The config field of a tower.

    Raises:
        UsageError: the config has no such part.
    """
    fields = parts_of(config)
    named = part.removesuffix("_config").removesuffix("_tower").removesuffix("_model")
    if named in fields and named not in TEXT:
        return fields[named]
    valid = ["text", *(name for name in fields if name not in TEXT)]
    raise UsageError(
        f"--part {part!r} is no part of a {config.get('model_type')} checkpoint.",
        f"{nearest(part, valid)}Valid values: {', '.join(valid)}.",
    )


def tower_table(config: Config, part: str) -> Mapping[str, Any] | None:
    """The table of a tower's class; None where none fits its config."""
    inner = config[tower_field(config, part)]
    tables = tables_of(str(inner["model_type"]))
    return next((t for t in tables if not t["place"] and not misfit(t, inner)), None)


def tower_family(config: Config, names: Mapping[str, Any], part: str) -> Family | None:
    """The family of one tower in a checkpoint of these tensors; None where no table fits it.

    Args:
        config: of the whole.
        names: name -> header entry.
        part: ``vision``, for example.

    Raises:
        UsageError: there is no such part.
        CheckpointError: its tensors are not those of its class.
    """
    field = tower_field(config, part)
    table = tower_table(config, part)
    if table is None:
        return None
    stem = _stem(table, names)
    if stem is None:
        raise CheckpointError(
            f"The tensors of {field} are not those of {table['class']}.",
            "Its class names or joins them in another way inside this model: growkit grows the "
            "language model of it (--part text).",
        )
    tensors = [
        {**t, "name": stem + t["name"], "dims": _renamed(t["dims"], stem)} for t in table["tensors"]
    ]
    tensors = [t for t in tensors if "{" in t["name"] or t["name"] in names]
    own = {t["name"].partition("{layer}")[0] if "{" in t["name"] else t["name"] for t in tensors}
    moved = {
        **table,
        "model_type": config["model_type"],
        "place": [field],
        "tensors": tensors,
        "patterns": [{**p, "name": stem + p["name"]} for p in table["patterns"]],
        "carried": [name for name in names if not name.startswith(tuple(own))],
    }
    family = read_with(moved, config, names)
    map_layers = family.map_layers
    assert map_layers is not None  # of every derived family

    def with_features(grown: Config, sources: Sequence[int], stack: str) -> dict[str, Any]:
        layers = family.sizes(config)["layer"]
        return {**map_layers(grown, sources, stack), **moved_features(config, layers, sources)}

    return replace(family, map_layers=with_features)


def moved_features(config: Config, layers: int, sources: Sequence[int]) -> dict[str, Any]:
    """Which hidden states of a vision tower the model looks at, after its layers have moved: those
    behind the same layers, counted from the end where they were.

    Args:
        config: of a model whose tower has ``layers`` layers.
        sources: old layer of each new one.
    """

    def moved(index: int) -> int:
        place = index if index >= 0 else layers + 1 + index  # in front of the first layer: 0
        new = sum(source < place for source in sources)
        return new if index >= 0 else new - len(sources) - 1

    result: dict[str, Any] = {}
    for name in ("vision_feature_layer", "vision_feature_layers"):
        value = config.get(name)
        if isinstance(value, int):
            result[name] = moved(value)
        elif isinstance(value, list) and all(isinstance(entry, int) for entry in value):
            result[name] = [moved(entry) for entry in value]
    return result


def _stem(table: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What stands before the names of the tower's tensors in the folder."""
    first = next((t["name"] for t in table["tensors"] if "{layer}" in t["name"]), None)
    if first is None:
        return None
    rest = first.replace("{layer}", "0")
    found = [name[: -len(rest)] for name in names if name.endswith(rest)]
    stems = [stem for stem in found if not stem or stem.endswith(".")]
    per_layer = list(_layered(table))
    whole = [s for s in stems if all(s + name in names for name in per_layer)]
    return min(whole, key=len, default=None)


def _renamed(dims: Any, stem: str) -> Any:
    """Dimensions whose sizes are those of stored tensors, by the names that these have here."""
    if not isinstance(dims, list):
        return dims
    if dims and dims[0] == "stored":
        return ["stored", stem + dims[1], *dims[2:]]
    return [_renamed(entry, stem) for entry in dims]


def _layered(table: Mapping[str, Any]) -> Iterator[str]:
    """Names of the tensors that every layer has, in layer 0."""
    for tensor in table["tensors"]:
        if "{layer}" in tensor["name"] and "layers" not in tensor:
            yield tensor["name"].replace("{layer}", "0").replace("{expert}", "0")
