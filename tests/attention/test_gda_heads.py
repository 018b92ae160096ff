"""Head counts: what fits, and messages that say what would."""

from __future__ import annotations

from fractions import Fraction

import pytest
from family_counts import kv_elements, parameters
from gda_cases import gda_config

from growkit.variants.gda.heads import GdaHeads


def test_counts_of_motif_2_12b():
    heads = GdaHeads.from_fields(40, 8, 16, 128, "own")
    assert (heads.n_signal, heads.n_noise, heads.n_kv) == (32, 8, 8)
    assert (heads.ratio, heads.signal_per_group, heads.noise_per_group) == (4, 4, 1)
    assert heads.value_dim == 256
    # q, k, v, o of attention.md section 3, lambda vectors, gain of the norm
    shapes = 5120 * 4096 + 2 * 2048 * 4096 + 4096 * 8192 + 4 * 128 + 256
    config = gda_config((32, 8, 8), hidden_size=4096, head_dim=128)
    assert parameters(config, "layers.0.self_attn") == shapes
    assert kv_elements(config) == 4096


def test_more_noise_than_signal_heads():
    heads = GdaHeads.from_fields(8, 6, 2, 16, "shared")
    assert (heads.ratio, heads.signal_per_group, heads.noise_per_group) == (Fraction(1, 3), 1, 3)
    assert heads.value_dim == 16


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((8, 3, 2, 16, "own"), ["num_noise_heads = 3", "5 signal heads", "[1, 2, 4, 6, 7]"]),
        ((8, 0, 2, 16, "own"), ["num_noise_heads = 0", "between 1 and 7"]),
        ((8, 8, 2, 16, "own"), ["num_noise_heads = 8", "num_attention_heads = 8"]),
        ((8, 2, 3, 16, "own"), ["num_key_value_heads = 3", "noise_keys = 'own'", "even"]),
        ((8, 2, 8, 16, "own"), ["num_key_value_heads = 8", "4 key/value groups", "[2, 4]"]),
        ((8, 2, 3, 16, "shared"), ["num_key_value_heads = 3", "6 signal", "[1, 2]"]),
        ((8, 2, 0, 16, "shared"), ["num_key_value_heads = 0", "positive"]),
        ((8, 2, 2, None, "own"), ["head_dim = None", "even"]),
        ((8, 2, 2, 15, "own"), ["head_dim = 15", "even"]),
        ((8, 2, 2, 16, "both"), ["noise_keys = 'both'", "own", "shared"]),
    ],
)
def test_counts_that_do_not_fit_name_the_fields_and_the_choices(counts, words):
    with pytest.raises(ValueError) as caught:
        GdaHeads.from_fields(*counts)
    for word in words:
        assert word in str(caught.value)
