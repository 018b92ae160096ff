"""Derived families against the tables that people wrote: the same tensors, axes, closings, links.

``oracles/`` has the tables that ``python -m growkit.derive.all`` derives of the types with a table
written by hand: what is planned with the one must be what is planned with the other. They are
derived anew by ``-m derive``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from growkit import GrowthRequest, plan
from growkit.core.errors import GrowkitError
from growkit.surgery.dim_map import DimMap
from growkit.surgery.tensor_plans import Action, TensorPlan

transformers = pytest.importorskip("transformers")

from growkit.derive.derivation import derive  # noqa: E402
from growkit.families import FAMILIES  # noqa: E402
from growkit.families.base import Dim, Family  # noqa: E402
from growkit.families.derived.family import derived_family, read_with  # noqa: E402
from growkit.families.derived.fit import misfit  # noqa: E402
from growkit.families.derived.store import forget, register  # noqa: E402

AXES = ("query_head", "kv_head", "ffn", "hidden")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MORE = pytest.mark.derive
CASES = [
    *(
        pytest.param(name, marks=MORE)
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "granite",
            "olmo2",
            "gemma2",
            "gemma3_text",
        )
    ),
    *(pytest.param(name, marks=MORE) for name in ("smollm3", "olmo3", "phi3", "qwen3_moe")),
]


def config_of(model_type: str) -> Any:
    extra: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "qwen3_moe":
        extra |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return transformers.AutoConfig.for_model(model_type, **SMALL, **extra)


def elements(dim: Dim, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """(axis, unit) of every element, where the axis is one that grows."""
    units = dim.layout(sizes)
    axes = [units.axes[code] for code in units.axis]
    named = [
        (axis, int(unit)) if axis in AXES else ("fixed", 0)
        for axis, unit in zip(axes, units.index, strict=True)
    ]
    return [entry for entry in named for _ in range(units.block)]


def hand_written(model_type: str) -> Family:
    return next(family for family in FAMILIES.values() if model_type in family.model_types)


@pytest.mark.parametrize("model_type", CASES)
def test_the_derived_table_says_what_the_written_one_says(model_type: str) -> None:
    config = config_of(model_type)
    table = derive(config)
    stated = config.to_dict() | {"model_type": model_type}
    written = hand_written(model_type)
    sizes = written.sizes_of(stated)
    names = dict(written.declared(sizes))
    derived = read_with(table, stated, list(names))
    derived_sizes = derived.sizes_of(stated, list(names))
    assert dict(derived.declared(derived_sizes)) == names
    here = {name: (tensor, layer) for tensor, layer, name in derived.names(derived_sizes)}
    for tensor, _, name in written.names(sizes):
        found, _ = here[name]
        assert found.writes_residual == tensor.writes_residual, name
        if tensor.writes_residual:
            assert found.gain_offset == tensor.gain_offset, name
        for mine, theirs in zip(found.dims, tensor.dims, strict=True):
            expected = elements(theirs, sizes)
            assert elements(mine, derived_sizes) == expected, name
            if any(axis in AXES for axis, _ in expected):
                assert (mine.consumes, mine.normed) == (theirs.consumes, theirs.normed), name
    for mine_link, their_link in zip(derived.links, written.links, strict=True):
        assert (mine_link.source, mine_link.target) == (their_link.source, their_link.target)
        assert np.array_equal(mine_link.indices(derived_sizes), their_link.indices(sizes))
    for option in ("--layers", "--ffn", "--query-heads", "--heads", "--kv-heads", "--hidden"):
        if option in table["operators"] and option not in written.refused:
            assert "error" in table["operators"][option], table["operators"][option]


# -- the same plans --------------------------------------------------------------------------------

ORACLES = sorted(Path(__file__).with_name("oracles").glob("*.json"))
PLAIN = SMALL | {"num_hidden_layers": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
LAYERED = PLAIN | {"sliding_window": 16, "tie_word_embeddings": True}
WHOLE_HEADS = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "gpt_neox": WHOLE_HEADS | {"intermediate_size": 80, "vocab_size": 96, "rotary_pct": 0.25},
    "opt": WHOLE_HEADS
    | {"ffn_dim": 80, "vocab_size": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "qwen3_moe": PLAIN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2},
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo3"), LAYERED),
}
REQUESTS: list[dict[str, Any]] = [
    {"layers": "x2"},
    {"layers": "+1", "new_layers": "copy"},
    {"layers": "+2", "new_layers": "random"},
    {"layers": "+1", "layer_placement": "end"},
    {"ffn": "x1.5"},
    {"ffn": "+8", "new_units": "zero"},
    {"query_heads": "x2"},
    {"heads": "x2", "new_heads": "zero"},
    {"kv_heads": "x2"},
    {"hidden": "x2"},
    {"hidden": "72"},
    {"hidden": "x2", "heads": "x2", "symmetry": "noise"},
    {"hidden": "x1.5", "heads": "x1.5"},
    {"head_dim": "x1.5"},
    {"head_dim": "x1.5", "hidden": "x1.5"},
    {"vocab": "+10"},
    {"untie_embeddings": True},
    {"layers": "+1", "hidden": "x2", "heads": "x2", "warm_start": "shrink-pad-perturb"},
]


def mapped(dim: DimMap | None) -> Any:
    """A dimension's map, element by element: blocks of another size say the same."""
    if dim is None:
        return None
    sources = dim.source[:, None] * dim.block + np.arange(dim.block)
    sources[dim.source < 0] = -1
    fills = [np.flatnonzero(dim.new(fill)).tolist() for fill in dim.fills]
    scale = None if dim.element_scale is None else dim.element_scale.tolist()
    return sources.reshape(-1).tolist(), dim.consumes, dim.old_width, fills, scale


def said(tensor: TensorPlan) -> Any:
    """What is written, whatever the tensor is called in the table."""
    new = tensor.source is None or any(dim is not None and dim.fills for dim in tensor.dims)
    init = tensor.init if new else ""
    offset = tensor.gain_offset if tensor.action is Action.CLOSED or tensor.factor != 1.0 else 0.0
    what = (tensor.action, round(tensor.factor, 12), tensor.noise, offset)
    return tensor.output, tensor.source, [mapped(dim) for dim in tensor.dims], init, what


def planned(folder: Path, request: Mapping[str, Any]) -> Any:
    """Config, tensors and how exact it is; None where it is refused."""
    try:
        made = plan(folder, GrowthRequest.from_mapping(request))
    except GrowkitError:
        return None
    steps = [(step.operator, step.reason, step.warnings) for step in made.growth.steps]
    tensors = {tensor.output.name: said(tensor) for tensor in made.tensors}
    return made.config, made.exactness, steps, tensors


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_what_is_planned_with_the_derived_table_is_planned_with_the_written_one(
    path: Path, tmp_path: Path
) -> None:
    table = json.loads(path.read_text())
    name = table["model_type"]
    stated = {"model_type": name, "architectures": [table["class"]], **CONFIGS.get(name, PLAIN)}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert misfit(table, stated) == ""
    for request in REQUESTS:
        written = planned(tmp_path, request)
        register(table)
        try:
            assert "derived" in derived_family(stated, registered=True).origin
            assert planned(tmp_path, request) == written, request
        finally:
            forget(table)
