"""Families: what a checkpoint's tensors are made of, one declarative table a file. No torch."""

from __future__ import annotations

from collections.abc import Collection

from growkit.errors import UsageError, nearest
from growkit.families.base import Config, Family, Tensor
from growkit.families.config_fields import check_fields
from growkit.families.diff_v1 import DIFF_V1
from growkit.families.diffllama import DIFFLLAMA
from growkit.families.gda import GDA
from growkit.families.gda_gated import DIFF_V2, GDA_GATED
from growkit.families.gemma import GEMMA2, GEMMA3
from growkit.families.gpt2 import GPT2
from growkit.families.gpt_neox import GPT_NEOX
from growkit.families.gqa import GQA
from growkit.families.llama import GRANITE, LLAMA, MISTRAL
from growkit.families.mixtral import MIXTRAL
from growkit.families.motif import MOTIF
from growkit.families.olmo2 import OLMO2
from growkit.families.olmo3 import OLMO3
from growkit.families.opt import OPT
from growkit.families.phi3 import PHI3
from growkit.families.qwen import QWEN2, QWEN3
from growkit.families.qwen_moe import QWEN3_MOE
from growkit.families.sas import SAS
from growkit.families.shared_diff import SHARED_DIFF
from growkit.families.smollm3 import SMOLLM3
from growkit.families.t5 import T5
from growkit.families.t5_grouped import T5_GQA, T5_WGQA
from growkit.families.unilm_diff_v1 import UNILM_DIFF_V1
from growkit.families.wgqa import WGQA
from growkit.families.wrapped import explain_config

# One line a family.
_ALL = (
    GDA,
    MOTIF,
    DIFFLLAMA,
    LLAMA,
    MISTRAL,
    GRANITE,
    QWEN2,
    QWEN3,
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
    T5_GQA,
    T5_WGQA,
    GQA,
    DIFF_V1,
    DIFF_V2,
    GDA_GATED,
    SHARED_DIFF,
    WGQA,
    SAS,
    UNILM_DIFF_V1,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family_of(config: Config, names: Collection[str] = ()) -> Family:
    """The family of a config.json, as a checkpoint with tensors of these names stores it.

    Raises UsageError for an unknown ``model_type``, and for fields that hold what no model has.
    """
    check_fields(config)
    model_type = config.get("model_type")
    candidates = [family for family in FAMILIES.values() if model_type in family.model_types]
    if len(candidates) == 1:
        return candidates[0].stored_as(names)
    if candidates:
        return _by_attention(candidates, config)
    known = sorted({name for family in FAMILIES.values() for name in family.model_types})
    raise explain_config(config, known) or UsageError(
        f"growkit has no family for model_type {model_type!r}.",
        f"{nearest(str(model_type), known)}Known model types: {', '.join(known)}.",
    )


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


__all__ = ["FAMILIES", "MOTIF", "Family", "Tensor", "family_of"]
