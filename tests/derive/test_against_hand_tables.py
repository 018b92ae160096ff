"""Derived families against the tables that people wrote: the same tensors, axes, closings, links.

The cheapest runs always; the others by ``-m derive``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from growkit.derive.derivation import derive  # noqa: E402
from growkit.families import FAMILIES  # noqa: E402
from growkit.families.base import Dim, Family  # noqa: E402
from growkit.families.derived import _Reader  # noqa: E402

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
    "llama",
    *(
        pytest.param(name, marks=MORE)
        for name in ("mistral", "qwen2", "qwen3", "granite", "olmo2", "gemma2", "gemma3_text")
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
    derived = _Reader(table, stated, list(names)).family()
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
