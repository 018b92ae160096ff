"""Growing an ordinary family and shrinking by the plan's own maps gives back the source's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import BIASES, FAMILIES, family_config, fitting, write_checkpoint, write_t5
from shrink import shrink


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_grow_then_shrink(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    config = family_config(family, bias=family in BIASES)
    source = write_checkpoint(tmp_path / "a", config, dtype)
    request = fitting(family, {"layers": "+3", "ffn": "+9", "hidden": "x2"})
    plan = tiny.grow(source, tmp_path / "b", **request)
    back = shrink(plan, tiny.read_folder(tmp_path / "b"))
    old = tiny.read_folder(source)
    assert back.keys() == old.keys()
    rescaled = {t.source for t in plan.tensors if t.factor != 1.0}
    # Untied, so only an embedding that its class scales by sqrt(hidden_size) is rescaled.
    assert rescaled == ({"model.embed_tokens.weight"} if family.startswith("gemma") else set())
    for name in old.keys() - rescaled:
        assert tiny.same_bits(back[name], old[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
def test_grow_then_shrink_both_stacks(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_t5(tmp_path / "a", "v1.1", dtype)
    request = {"layers": "+3", "decoder_layers": "+2", "heads": "x3", "ffn": "+9", "hidden": "x2"}
    plan = tiny.grow(source, tmp_path / "b", **request)
    back = shrink(plan, tiny.read_folder(tmp_path / "b"))
    old = tiny.read_folder(source)
    assert back.keys() == old.keys()
    for name in old:
        assert tiny.same_bits(back[name], old[name]), name
