"""Config fields of B against what the plan writes, or against A's own: for what no text shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.core.errors import GrowkitError
from growkit.families import family_of
from growkit.surgery.plan import Plan
from growkit.verification.folder import Folder
from growkit.verification.report import ConfigFields

# What no forward pass reads.
BOOKKEEPING = frozenset(
    (
        *("growkit", "auto_map", "architectures", "transformers_version", "torch_dtype", "dtype"),
        *("_name_or_path", "name_or_path", "model_type", "use_cache", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "id2label", "label2id"),
        *("initializer_range", "init_std", "initializer_factor", "num_labels", "problem_type"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"),
        *("dropout", "activation_dropout", "dropout_rate", "layerdrop", "classifier_dropout"),
        *("return_dict", "output_hidden_states", "output_attentions", "output_router_logits"),
        *("chunk_size_feed_forward", "pretraining_tp", "router_aux_loss_coef"),
        "_attn_implementation",
    )
)
ABSENT = "absent"


def compare_configs(
    a: Folder, b: Folder, config_a: Any, config_b: Any, plan: Plan | None
) -> ConfigFields:
    """Every field that a forward pass may read and that growth had no reason to change.

    Args:
        config_a, config_b: as transformers has them, with what the class assumes.
        plan: that made B from A, if it is known.
    """
    if plan is not None:
        expected = dict(plan.config)
        try:  # as the class reads it, so that a default that is spelled out is no difference
            expected = type(config_b).from_dict(expected).to_dict()
            found = config_b.to_dict()
        except Exception:  # a class of other keys (Motif): what lies on disk has to be equal
            found = dict(b.config)
        return ConfigFields("plan", tuple(_differences(expected, found, frozenset())))
    if config_a.model_type != config_b.model_type:
        return ConfigFields("")
    left, right = config_a.to_dict(), config_b.to_dict()
    return ConfigFields("a", tuple(_differences(left, right, _size_fields(a, left, right))))


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], free: frozenset[str]
) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    return [
        f"{name} is {found.get(name, ABSENT)!r} instead of {expected.get(name, ABSENT)!r}"
        for name in names
        if name not in BOOKKEEPING | free and found.get(name) != expected.get(name)
    ]


def _size_fields(a: Folder, left: Mapping[str, Any], right: Mapping[str, Any]) -> frozenset[str]:
    """Fields that hold sizes, and lists with one entry per layer where the depths differ."""
    free = {"head_dim", "hidden_size", "intermediate_size", "num_hidden_layers"}
    try:
        family = family_of(a.config, a.tensors)
        free |= set(family.config_fields(family.sizes_of(a.config, a.tensors)))
        free |= set(family.layer_counts)
        per_layer = family.per_layer_fields
    except (GrowkitError, KeyError, TypeError, ValueError):
        per_layer = ("layer_types",)
    return frozenset(
        free
        | {
            name
            for name in per_layer
            if isinstance(left.get(name), list)
            and isinstance(right.get(name), list)
            and len(left[name]) != len(right[name])
        }
    )
