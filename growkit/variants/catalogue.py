"""The attention variants, one row each: all that other rooms know of them is made from here.

A variant is a folder with ``attention.py`` (the definition and its fast path), ``family.py`` (the
tensors of its checkpoints) and ``convert.py`` (how another attention becomes it), or those of the
three that it has, and one row below. From the rows come

* the families of :data:`growkit.families.FAMILIES`,
* the values of the config field ``attention`` (``attentions.py``, and its exported form),
* the values of ``growkit convert --to``, and what ``growkit export --fold`` can do.

Reading the table imports no variant: parts are loaded when they are asked for. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.families.base import Family
    from growkit.surgery.effect import Effect, ModelShape, Operator

    # From a ConversionRequest, whose module reads this table.
    Maker = Callable[[Any], Operator]


@dataclass(frozen=True)
class Variant:
    """One attention variant.

    Attributes:
        folder: in ``growkit/variants``; also what the config field ``attention`` says.
        attention: class in its ``attention.py``, for model type ``growkit``.
        families: constants of its ``family.py``, each the upper-case name of the family.
        sizes: config fields of its own that count something.
        targets: values of ``--to``, keys of ``TARGETS`` in its ``convert.py``.
        sources: families that its targets are for, and no other conversion is; empty: every other.
        fold: function in ``plain/convert.py`` that makes ordinary attention of its families.
        not_linear: why there is none.
        read_as: (class, method) of ``growkit.modeling`` that reads a config of its families, which
            transformers has no class for.
    """

    folder: str
    attention: str = ""
    families: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    fold: str = ""
    not_linear: str = ""
    read_as: tuple[str, str] | None = None

    def part(self, file: str) -> Any:
        """The module ``attention``, ``family`` or ``convert`` of its folder."""
        return import_module(f"growkit.variants.{self.folder}.{file}")

    @property
    def makers(self) -> Mapping[str, Maker]:
        """Value of ``--to`` -> how the conversion is made of the request."""
        makers: Mapping[str, Maker] = self.part("convert").TARGETS
        return makers


HEAD_NORM = "every head has a norm of its own"

# One row a variant.
CATALOGUE = (
    Variant("plain", targets=("plain",)),
    Variant("gqa", "GroupedQueryAttention", families=("GQA",), targets=("mha", "gqa", "mqa")),
    Variant(
        "gda",
        families=("GDA",),
        sizes=("num_noise_heads",),
        targets=("gda",),
        fold="fold_differential",
    ),
    Variant(
        "diff_v1",
        "DiffV1Attention",
        families=("DIFF_V1",),
        targets=("diff_v1",),
        fold="fold_differential",
    ),
    Variant("diff_v2", "DiffV2Attention"),  # tensors and conversion: gda_gated's at 1:1
    Variant(
        "gda_gated",
        "GdaGatedAttention",
        families=("DIFF_V2", "GDA_GATED"),
        targets=("gda_gated", "diff_v2"),
        not_linear="its lambda depends on the token",
    ),
    Variant(
        "shared_diff",
        "SharedDiffAttention",
        families=("SHARED_DIFF",),
        sizes=("query_rank", "key_rank"),
        targets=("shared_diff",),
        fold="fold_differential",
    ),
    Variant(
        "wgqa",
        "WeightedGroupedQueryAttention",
        families=("WGQA",),
        targets=("wgqa",),
        fold="fold_wgqa",
    ),
    Variant(
        "sas",
        "SimulatedAttention",
        families=("SAS",),
        sizes=("num_simulated_heads", "simulated_head_dim", "sas_kernel_size"),
        targets=("sas",),
        not_linear="its heads pass through a ReLU",
    ),
    Variant(
        "unilm_diff_v1",
        "UnilmDiffV1Attention",
        families=("UNILM_DIFF_V1",),
        not_linear=f"{HEAD_NORM} (subln)",
    ),
    Variant(
        "diffllama",
        families=("DIFFLLAMA",),
        targets=("diffllama", "unilm_diff_v1"),
        not_linear=HEAD_NORM,
    ),
    Variant(
        "motif",
        families=("MOTIF",),
        not_linear=f"{HEAD_NORM} (subln)",
        read_as=("GdaConfig", "from_motif"),
    ),
    Variant(
        "wgqa_t5",
        families=("T5_GQA", "T5_WGQA"),
        sizes=("decoder_num_key_value_heads",),
        targets=("mha", "gqa", "mqa", "wgqa", "plain"),
        sources=("t5", "t5_gqa", "t5_wgqa"),
    ),
)

# Value of --to -> the variant that makes it of an ordinary decoder.
CONVERSIONS = {to: row for row in CATALOGUE if not row.sources for to in row.targets}
ATTENTIONS = tuple(row for row in CATALOGUE if row.attention)
SIZES = tuple(field for row in CATALOGUE for field in row.sizes)


def families() -> list[Family]:
    """The family of every variant; imports their tables."""
    return [getattr(row.part("family"), name) for row in CATALOGUE for name in row.families]


def converter_of(family: str, to: str) -> Variant | None:
    """The variant that makes ``to`` of a family's checkpoints."""
    for row in CATALOGUE:
        if family in row.sources:
            return row
    return CONVERSIONS.get(to)


def variant_of(family: str) -> Variant | None:
    """The variant that a family belongs to."""
    return next((row for row in CATALOGUE if family.upper() in row.families), None)


def fold_of(family: str) -> Callable[[ModelShape, dict[str, Any]], Effect] | None:
    """How ordinary attention is made of a family, if its attention is linear in its maps."""
    row = variant_of(family)
    if row is None or not row.fold:
        return None
    fold: Callable[[ModelShape, dict[str, Any]], Effect]
    fold = getattr(import_module("growkit.variants.plain.convert"), row.fold)
    return fold


def config_reader(model_type: object) -> Callable[[Mapping[str, Any]], Any] | None:
    """What reads a config of this type, where transformers cannot; imports torch if it is there."""
    for row in CATALOGUE:
        if row.read_as is not None:
            tables = [getattr(row.part("family"), name) for name in row.families]
            if any(model_type in family.model_types for family in tables):
                holder, method = row.read_as
                made = getattr(import_module("growkit.modeling"), holder)
                reader: Callable[[Mapping[str, Any]], Any] = getattr(made, method)
                return reader
    return None


def attention_table() -> str:
    """Source text of ``variants.py`` in an exported folder: ``attentions.py`` without this table,
    for transformers' loader follows written imports alone."""
    imports = {f".{row.folder}.attention": row.attention for row in ATTENTIONS}
    imports[".shared.one_call"] = "AttentionBase"
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""The table of attention variants: what the config field ``attention`` may say."""',
        "",
        "from __future__ import annotations",
        "",
        *(f"from {module} import {name}" for module, name in sorted(imports.items())),
        "",
        "# One line a variant.",
        "VARIANTS: dict[str, type[AttentionBase]] = {",
        *(f'    "{row.folder}": {row.attention},' for row in ATTENTIONS),
        "}",
    ]
    return "\n".join(lines) + "\n"
