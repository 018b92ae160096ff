"""Families: what a checkpoint's tensors are made of, one declarative table a file. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, nearest, nearest_version
from growkit.families.base import Config, Family, Tensor
from growkit.families.config_fields import check_fields
from growkit.families.derived.family import derived_family
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import shipped_types, tables_of
from growkit.families.gemma import GEMMA2, GEMMA3
from growkit.families.gpt2 import GPT2
from growkit.families.gpt_neox import GPT_NEOX
from growkit.families.llama import GRANITE, LLAMA, MISTRAL, SMOLLM3
from growkit.families.mixtral import MIXTRAL
from growkit.families.olmo import OLMO2, OLMO3
from growkit.families.opt import OPT
from growkit.families.phi3 import PHI3
from growkit.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from growkit.families.stored_parts import with_stored_parts
from growkit.families.t5 import T5
from growkit.families.towers import tower_family, tower_field
from growkit.families.wrapped import explain_config

# One line a family of transformers.
_ORDINARY = (
    LLAMA,
    MISTRAL,
    GRANITE,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    MIXTRAL,
    SMOLLM3,
    PHI3,
    OLMO2,
    OLMO3,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    OPT,
    T5,
)
# The table of those of growkit/variants, which are written with the parts of this package and so
# are imported when a family is first asked for.
_VARIANTS = "growkit.variants.catalogue"


class NoFamily(UsageError):
    """No table, written or derived, is for this config. One may still be derived.

    ``meant``: the sentence that names the nearest model type; empty where none is near.
    """

    def __init__(self, cause: str, remedy: str, config: Config, meant: str = "") -> None:
        super().__init__(cause, remedy)
        self.config, self.meant = config, meant


class _Families(MutableMapping[str, Family]):
    """Name -> family, complete from the first look on."""

    @cached_property
    def _by_name(self) -> dict[str, Family]:
        families = [*_ORDINARY, *import_module(_VARIANTS).families()]
        return {family.name: family for family in families}

    def __getitem__(self, name: str) -> Family:
        return self._by_name[name]

    def __setitem__(self, name: str, family: Family) -> None:
        self._by_name[name] = family

    def __delitem__(self, name: str) -> None:
        del self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


FAMILIES: MutableMapping[str, Family] = _Families()


def family_of(config: Config, names: Collection[str] = ()) -> Family:
    """The family of a config.json, as a checkpoint with tensors of these names stores it.

    ``names``: with their header entries, as :class:`Checkpoint` has them, also what the class does
    not read and the scales of quantised weights are in it.

    Raises UsageError for an unknown ``model_type``, and for fields that hold what no model has.
    """
    return with_stored_parts(_family_of(config, names), config, names)


def _family_of(config: Config, names: Collection[str]) -> Family:
    model_type = config.get("model_type")
    candidates = [family for family in FAMILIES.values() if model_type in family.model_types]
    check_fields(config, import_module(_VARIANTS).SIZES, by_layer=not candidates)
    if (family := derived_family(config, names, registered=True)) is not None:
        return family
    if len(candidates) == 1:
        return candidates[0].stored_as(names)
    if candidates:
        return _by_attention(candidates, config)
    if (family := derived_family(config, names)) is not None:
        return family
    written = {name for family in FAMILIES.values() for name in family.model_types}
    known = sorted({*written, *shipped_types()})
    explained = explain_config(config, known)
    others = list(tables_of(str(model_type)))
    if others and not explained:
        raise NoFamily(
            f"No table of {model_type!r} is of this config.json: {misfit(others[0], config)!r} "
            "says something else than where it was derived.",
            "`growkit derive FOLDER` makes one of it.",
            config,
        )
    meant = "" if explained else nearest_version(str(model_type), known)
    raise NoFamily(
        explained.cause if explained else f"growkit has no family for model_type {model_type!r}.",
        explained.remedy
        if explained
        else f"{meant}Known model types: "
        f"{', '.join(sorted(written))}, and {len(known) - len(written)} whose derived tables ship; "
        "`growkit derive` makes a table for any other that transformers has a class of.",
        config,
        meant,
    )


def is_encoder(config: Config) -> bool:
    """A family that growkit knows, of models that predict no next token."""
    try:
        return family_of(config).is_encoder
    except UsageError:
        return False


def check_trainable(config: Config, folder: Path) -> None:
    """Raises:
    UsageError: the folder holds no decoder-only model.
    """
    if config.get("is_encoder_decoder"):
        raise UsageError(
            f"{str(folder)!r} is an encoder-decoder; growkit trains decoder-only models.",
            "Train it with the sequence-to-sequence trainer of transformers.",
        )
    if is_encoder(config):
        raise UsageError(
            f"{str(folder)!r} is an encoder; growkit trains decoder-only models.",
            "Train it with the Trainer of transformers.",
        )


def family_of_tower(config: Config, names: Mapping[str, Any], part: str) -> Family:
    """The family of a multimodal config whose tower ``part`` grows, by the table of its class.

    Raises UsageError for a part that there is not, and :class:`NoFamily` where it has no table.
    """
    family = tower_family(config, names, part)
    if family is not None:
        return family
    inner = config[tower_field(config, part)]
    raise NoFamily(
        f"growkit has no table for the tower's class ({inner['model_type']!r}).",
        "Only what is proven of it alone grows.",
        inner,
    )


def sizes_where_known(config: Any) -> tuple[Family, dict[str, int]] | None:
    """Family and sizes of a config object of transformers; None for a model that is none of ours.

    ``config`` may be None: of a module that has none.
    """
    try:
        fields = config.to_dict()
        family = family_of(fields)
        return family, family.sizes(fields)
    except (AttributeError, UsageError):
        return None


def _by_attention(candidates: list[Family], config: Config) -> Family:
    field = candidates[0].attention_field
    asked = config.get(field, "gqa")  # the classes' default
    for family in candidates:
        if family.attention == asked:
            return family
    known = sorted(str(family.attention) for family in candidates)
    raise UsageError(
        f"config.json has {field} = {asked!r}, which growkit does not know.",
        f"{nearest(str(asked), known)}Valid values: {', '.join(known)}.",
    )


__all__ = [
    "FAMILIES",
    "Family",
    "Tensor",
    "check_trainable",
    "family_of",
    "family_of_tower",
    "is_encoder",
    "sizes_where_known",
]
