"""Learning rates that follow the size: ``training.rate_rule``, from the axes of every tensor.

A family table says which axes a tensor reads and which it writes, so the factor of every tensor is
known for any family. Let r be its fan-in (entries of the dimensions that it reads) over that of the
base model, and l the layers over the base's.

============  =====================================  ====================================
              ``mup`` (arXiv:2203.03466, table 3)     ``completep`` adds (arXiv:2505.01618)
============  =====================================  ====================================
hidden        AdamW rate / r, start / sqrt(r)         what writes the residual stream:
output        AdamW rate / r, start / r               rate / l, start / l
embedding     unchanged
vectors       unchanged
============  =====================================  ====================================

*Hidden* matrices write an axis that grows, *output* matrices (the output projection, a router) one
of fixed size. Weight decay is divided by the factor on the rate, so that their product stays. Table
3 has no multipliers in the forward pass, so no class has to know of the rule: a multiplier m of a
weight is the same as a start and an AdamW rate times m (Lemma J.1 there). For the same reason the
1 / L of CompleteP's residual branches stands in what they write last. A *tied* output projection
cannot have both its own factor and the embedding's: it keeps the embedding's, and a run says so.

Muon gives its update a size by the matrix: ``original`` has spectral norm sqrt(max(1, rows /
columns)), which needs no factor across width (arXiv:2310.17813); ``match_rms_adamw`` has entries of
one size, hence a spectral norm that rises by sqrt(max(rows, columns)), and is divided by that.

The factors are relative to a base model, at which ``learning_rate`` is right: ``rate_base``, else
the model that a staged run starts from, else the parent of a grown checkpoint. For a checkpoint
that was not trained under the rule nothing else could be meant: its start is past, and what the
rule says about two sizes of one model is the ratio of their rates. Starts are scaled in models
from scratch alone. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from growkit.core.errors import UsageError, nearest
from growkit.families import Family, Tensor, family_of
from growkit.record.manifest import read_manifest
from growkit.training.recipe import Recipe
from growkit.training.recipe_training import TrainingSection

Sizes = Mapping[str, int]
FIXED = {"fixed", "vocab", "expert"}  # axes that count as the outside of the model


@dataclass(frozen=True)
class Factors:
    """Of one tensor, relative to the base model.

    Attributes:
        adamw, muon: on the learning rate under each optimizer.
        start: on the spread of its random start.
    """

    adamw: float = 1.0
    muon: float = 1.0
    start: float = 1.0

    def rate(self, kind: str) -> float:
        """``kind`` is ``adamw`` or ``muon``."""
        return self.muon if kind == "muon" else self.adamw


def rate_factors(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Factors]:
    """Parameter name -> its factors, for the model with this config; empty under ``standard``.

    Raises:
        UsageError: no base is known, or the model is of a family that growkit does not know.
    """
    section = recipe.training
    if section.rate_rule == "standard":
        return {}
    family = family_of(config)
    sizes = family.sizes(config)
    base = _base_sizes(recipe, family, config)
    found = {}
    # transformers stacks the experts of a layer in memory, whatever the files hold.
    for facts in ({}, {"fused_experts": 1}):
        for tensor, _, name in family.names({**sizes, **facts}):
            found[name] = tensor_factors(tensor, sizes, base, section)
    return found


def tensor_factors(tensor: Tensor, sizes: Sizes, base: Sizes, section: TrainingSection) -> Factors:
    """The rule for one tensor of a model of ``sizes``."""
    depth = 1.0
    if section.rate_rule == "completep" and tensor.writes_residual:
        depth = sizes[tensor.stack] / max(base[tensor.stack], 1)
    fan_in, fan_out = (_fan(tensor, sizes, base, reads=reads) for reads in (True, False))
    if fan_in is None:
        return Factors(1.0 / depth, 1.0 / depth, 1.0 / depth)
    hidden = fan_out is not None and _writes_what_grows(tensor, sizes)
    start = fan_in**-0.5 if hidden else 1.0 / fan_in
    muon = 1.0
    if section.muon_adjust == "match_rms_adamw":
        muon = (_longest(tensor, base) / _longest(tensor, sizes)) ** 0.5
    return Factors(1.0 / (fan_in * depth), muon / depth, start / depth)


def _fan(tensor: Tensor, sizes: Sizes, base: Sizes, *, reads: bool) -> float | None:
    """Entries of the dimensions that it reads (or writes), over the base's; None: it has none."""
    dims = [dim for dim in tensor.dims if dim.consumes is reads]
    if not dims:
        return None
    return prod(dim.layout(sizes).width / dim.layout(base).width for dim in dims)


def _writes_what_grows(tensor: Tensor, sizes: Sizes) -> bool:
    axes = {axis for d in tensor.dims if not d.consumes for axis in d.layout(sizes).axes}
    return bool(axes - FIXED)


def _longest(tensor: Tensor, sizes: Sizes) -> int:
    return max(tensor.shape(sizes)[-2:])


def tied_note(recipe: Recipe, config: Mapping[str, Any]) -> str:
    """What the rule cannot do for a model with tied embeddings; empty where there is nothing."""
    if recipe.training.rate_rule == "standard" or not family_of(config).sizes(config)["tied"]:
        return ""
    return (
        f"training.rate_rule {recipe.training.rate_rule}: the output projection is tied to the "
        "embedding and keeps its rate and start, so logits still grow with the width "
        "(tie_word_embeddings: false gives it its own)"
    )


def _base_sizes(recipe: Recipe, family: Family, config: Mapping[str, Any]) -> Sizes:
    stated = recipe.training.rate_base
    if stated is not None:
        for key in stated:
            if key not in config:
                raise UsageError(
                    f"training.rate_base names {key!r}, which config.json does not have.",
                    f"{nearest(key, config)}Give config fields of the base model, for example "
                    "{hidden_size: 128, num_hidden_layers: 2}.",
                )
        return family.sizes({**config, **_lists_left_out(config, stated)})
    source = recipe.model.checkpoint
    axes = ((read_manifest(source) or {}).get("plan") or {}).get("axes") if source else None
    if not axes:
        raise UsageError(
            f"training.rate_rule {recipe.training.rate_rule} needs to know the size at which "
            "training.learning_rate is right.",
            "Give training.rate_base, for example {hidden_size: 128, num_hidden_layers: 2}; a run "
            "with stages and a checkpoint that growkit grew know it.",
        )
    before = {axis: entry["before"] for axis, entry in axes.items()}
    return {**family.sizes(config), **before}


def _lists_left_out(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The base's fields; lists of the written depth cut to the base's."""
    layers = stated.get("num_hidden_layers", stated.get("n_layer"))
    if layers is None:
        return dict(stated)
    lists = {
        name: (value * layers)[:layers] if len(value) < layers else value[:layers]
        for name, value in config.items()
        if isinstance(value, list) and name in ("layer_types", "lambda_init", "no_rope_layers")
    }
    return {**lists, **stated}
