"""What attention costs where layers look back on a window, counted token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from family_checkpoints import T5_SIZES, family_config, write_checkpoint

from growkit.checkpoint import open_checkpoint
from growkit.families import family_of
from growkit.record.cost import cost_of
from growkit.record.inspect import inspect_checkpoint

# Family -> windows of its four layers; None where a layer sees everything.
WINDOWS: dict[str, list[int | None]] = {
    "llama": [None] * 4,
    "mistral": [16] * 4,
    "mixtral": [16] * 4,
    "qwen2": [None, None, 16, 16],
    "qwen3": [None] * 4,
    "gemma2": [16, None, 16, None],
    "gemma3": [16, 16, None, 16],
    "olmo3": [16, 16, 16, None],
}


@pytest.mark.parametrize("family", WINDOWS)
def test_windows(family: str) -> None:
    config = family_config(family, sliding_window=16)
    table = family_of(config)
    assert table.attention_windows(config, 4) == WINDOWS[family]
    sizes = table.sizes(config)
    context, per_token = 200, 2 * 2 * 8 * 2  # keys and values of 2 heads of 8, in two bytes
    cost = cost_of(table, sizes, "BF16", context, config)
    kept = sum(min(context, window or context) for window in WINDOWS[family])
    assert cost.kv_cache_bytes_per_token == per_token * kept // context
    seen = sum(min(t, window or t) for window in WINDOWS[family] for t in range(context)) / context
    full = cost_of(table, sizes, "BF16", context)
    all_seen = sum(4 * t for t in range(context)) / context
    saved = 4 * sizes["query_head"] * sizes["head_dim"] * (all_seen - seen)
    assert full.flops_per_token - cost.flops_per_token == pytest.approx(saved, rel=0.02, abs=1)


def test_a_window_longer_than_the_context_changes_nothing() -> None:
    config = family_config("mistral", sliding_window=4096)
    table = family_of(config)
    sizes = table.sizes(config)
    assert cost_of(table, sizes, "F32", 512, config) == cost_of(table, sizes, "F32", 512)


def test_inspect_knows_windows(tmp_path: Path) -> None:
    def cache(window: int) -> Any:
        config = family_config("gemma3", sliding_window=window)
        folder = write_checkpoint(tmp_path / str(window), config)
        with open_checkpoint(folder) as checkpoint:
            return inspect_checkpoint(checkpoint)["cost"]["kv_cache_bytes_per_token"]

    # Three layers of four keep 16 and 64 of 512 tokens.
    assert (cache(16), cache(64)) == (int(128 * (1 + 3 / 32)), 128 + 3 * 16)


def test_encoder_decoder() -> None:
    """A source and a target token: an encoder sees all, a decoder half of its own and all of it."""
    table = family_of(T5_SIZES)
    cost = cost_of(table, table.sizes(T5_SIZES), "F32", 64)
    heads = 4 * 12
    assert cost.kv_cache_bytes_per_token == 3 * 2 * 2 * heads * 4
    attention = 4 * heads * 64 * (2 * 1.0 + 3 * 1.5)
    assert cost.flops_per_token == 2 * cost.parameters + attention


def test_a_decoder_whose_heads_fill_its_width_keeps_keys_and_values() -> None:
    """Whisper: of each target token its own, of each source token those of cross-attention."""
    config = {"model_type": "whisper", "d_model": 64, "encoder_layers": 2, "decoder_layers": 3}
    table = family_of(config)
    cost = cost_of(table, table.sizes(config), "F16", 32)
    assert cost.kv_cache_bytes_per_token == 3 * 2 * (2 * 64) * 2


def test_packed_values_count_and_their_scales_do_not() -> None:
    """MXFP4 stores two values of four bits in a byte, and a scale for 32 of them."""
    config = family_config("llama")
    name = "model.layers.{}.mlp.down_proj.weight"
    plain = family_of(config)
    width, hidden = plain.sizes(config)["ffn"], plain.sizes(config)["hidden"]
    names = {n: NameShape(s) for n, s in plain.declared(plain.sizes(config))}
    for layer in range(config["num_hidden_layers"]):
        del names[name.format(layer)]
        names[name.format(layer) + "_blocks"] = NameShape((hidden, width // 2))
        names[name.format(layer) + "_scales"] = NameShape((hidden, width // 8))
    packed = family_of(config, names)
    counts = [
        cost_of(family, family.sizes(config), "BF16", 8).parameters for family in (plain, packed)
    ]
    assert counts[0] == counts[1]


class NameShape(NamedTuple):
    """A header entry, as families read it."""

    shape: tuple[int, ...]
