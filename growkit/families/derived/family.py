"""The family of a config, by a derived table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from growkit.families.base import Config, Family, Link, Norm, Tensor
from growkit.families.derived.config_changes import ConfigChanges, repeated
from growkit.families.derived.config_sizes import ConfigSizes
from growkit.families.derived.fit import misfit
from growkit.families.derived.form import BUFFERS, INNER, evaluate
from growkit.families.derived.refusals import refusal, refused_options
from growkit.families.derived.store import registered_tables, tables_of
from growkit.families.derived.tensors import TableTensors
from growkit.families.head_dim_rules import HeadDimRule
from growkit.families.unit_layout import IntArray, Sizes


def derived_family(
    config: Config, names: Collection[str] = (), *, registered: bool = False
) -> Family | None:
    """The family of a config by a derived table; None where none fits.

    ``registered``: by one of this process alone.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    for table in registered_tables(model_type) if registered else tables_of(model_type):
        if not misfit(table, config):
            return read_with(table, config, names)
    return None


def read_with(table: Mapping[str, Any], config: Config, names: Collection[str] = ()) -> Family:
    """The family of a config by this table."""
    read = ConfigSizes(table, config, names)
    changes, made = ConfigChanges(read), TableTensors(read)
    tensors = tuple(made.tensor(entry) for entry in table["tensors"])
    if carried := tuple(table.get("carried", ())):
        tensors += tuple(
            Tensor(name, name, made.carried(name, shape))
            for name, shape in read.stored.items()
            if name.startswith(carried)
        )
    heads = "query_head" in read.axes
    family = Family(
        name=table["model_type"],
        model_types=(table["model_type"],),
        tensors=tensors,
        sizes=read.sizes,
        config_fields=changes.fields,
        kv_elements=lambda sizes: evaluate(table["cost"]["kv_elements"], sizes),
        attention_flops=lambda sizes: 4 * evaluate(table["cost"]["attended"], sizes),
        links=(_shared("query_head", "kv_head"),) if heads else (),
        per_layer_fields=(),
        layer_rules={n: repeated(period) for n, period in table["layers"]["lists"].items()},
        layers_at=read.place,
        stacks=read.stacks(),
        stored_facts=read.stored_facts,
        norm=_norm(read),
        sqrt_embedding_scale=bool(read.stream.get("sqrt_embedding")),
        root_divided=tuple(read.stream.get("root_divided", ())),
        head_dim=_head_dim_rule(read),
        refusal=lambda config, sizes: refusal(read, sizes),
        ignored=BUFFERS,
        prefix=read.prefix,
        spellings=table.get("spellings", {}),
        unread=tuple(table["copied"]),
        refused=refused_options(read),
        full_copies_only=lambda sizes: _whole(read),
        map_layers=changes.map_layers,
        layer_period=table["layers"]["period"],
        hidden_along=tuple(axis for axis in read.fills if axis == INNER),
        scaled_by_depth="root" in table["layers"]["counts"].values(),
        first_copied={
            stack: first
            for stack, part in (("layer", table["layers"]), ("decoder_layer", read.second))
            if (first := part.get("first", 0))
        },
        origin=f"derived, proven on a twin with transformers {table['transformers']}",
    )
    return family.stored_as(read.names)


def _whole(read: ConfigSizes) -> tuple[str, ...]:
    """Axes that a norm runs over; what norms all query heads norms all keys too."""
    whole = list(read.table["whole"])
    if "query_head" in whole and "kv_head" in read.axes:
        whole.append("kv_head")
    return tuple(dict.fromkeys(whole))


def _head_dim_rule(read: ConfigSizes) -> HeadDimRule:
    """Whether the size of heads grows, and what goes with it."""
    said = read.table.get("heads")
    if not said:
        proof = read.table["operators"].get("--head-dim", {})
        return HeadDimRule(proof.get("why", "growth of head_dim is not derived"))
    scaled, along = bool(said["scaled"]), ("head_width",) if "query_head" in read.fills else ()
    return HeadDimRule("", lambda config: scaled, read.rotary(), along)


def _norm(read: ConfigSizes) -> Norm:
    """The norms over the residual stream."""
    norm = read.stream.get("norm", {"why": "it is not derived yet"})
    if "why" in norm:
        return Norm(refusal=norm["why"])
    shared = norm.get("shared", "") if norm["eps_field"] else ""
    inputs = tuple(norm.get("shared_inputs", ())) if shared else ()
    return Norm(norm["eps_field"], norm["eps"], norm["centred"], shared, inputs)


def _shared(source: str, target: str) -> Link:
    """Consecutive units of ``source`` share one unit of ``target``."""

    def indices(sizes: Sizes) -> IntArray:
        return (np.arange(sizes[source]) * sizes[target] // sizes[source]).reshape(-1, 1)

    return Link(source, target, indices)
