"""The streamed result against growth in memory: bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny_checkpoints as tiny

gda, motif, diffllama, llama = (
    tiny.gda_config,
    tiny.motif_config,
    tiny.diffllama_config,
    tiny.llama_config,
)
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
POLY = {"hidden_act": "poly_norm"}
Step = tuple[str, Any]

# (config, request, the same growth as steps of the oracle).
CASES: dict[str, tuple[tiny.Config, dict[str, Any], list[Step]]] = {
    "signal-2:1": (gda(), {"signal_heads": "x2"}, [("signal", 2)]),
    "signal-1:1": (gda(2, 2), {"signal_heads": "x2"}, [("signal", 2)]),
    "signal-3:1-x3": (gda(6, 2, 1), {"signal_heads": "x3"}, [("signal", 3)]),
    "signal-shared": (gda(4, 2, 1, own=False), {"signal_heads": "16"}, [("signal", 4)]),
    "signal-no-norm": (gda(sub_layer_norm=False), {"signal_heads": "+4"}, [("signal", 2)]),
    "signal-motif": (motif(8, 4, 2), {"signal_heads": "x2"}, [("signal", 2)]),
    "noise-4:1-x2": (gda(8, 2), {"noise_heads": "x2"}, [("noise", 2)]),
    "noise-4:1-x4": (gda(8, 2), {"noise_heads": "x4"}, [("noise", 4)]),
    "noise-motif-to-1:1": (motif(8, 4, 2), {"noise_heads": "x2"}, [("noise", 2)]),
    "uniform-2:1": (gda(), {"uniform_heads": "x2"}, [("uniform", 2)]),
    "uniform-1:2": (gda(2, 4, 1), {"uniform_heads": "x3"}, [("uniform", 3)]),
    "uniform-diffllama": (diffllama(8, 4), {"uniform_heads": "x2"}, [("uniform", 2)]),
    "ffn-llama": (llama(**BIASED), {"ffn": "x2"}, [("ffn", 2)]),
    "ffn-poly-norm": (gda(**POLY), {"ffn": "x3"}, [("ffn", 3)]),
    "hidden-llama": (llama(**BIASED), {"hidden": "x2"}, [("hidden", 2)]),
    "hidden-tied": (gda(**TIED), {"hidden": "x2"}, [("hidden", 2)]),
    "hidden-diffllama": (diffllama(), {"hidden": "x3"}, [("hidden", 3)]),
    "untied-hidden": (
        motif(**TIED),
        {"untie_embeddings": True, "hidden": "x2"},
        [("untie", 1), ("hidden", 2)],
    ),
    "depth-even": (gda(num_hidden_layers=4), {"layers": "+2"}, [("depth", [1, 3])]),
    "depth-end": (llama(**BIASED), {"layers": "4", "layer_placement": "end"}, [("depth", [1, 1])]),
    "depth-given": (
        llama(num_hidden_layers=3),
        {"layers": "+3", "layer_placement": "0,0,2"},
        [("depth", [0, 0, 2])],
    ),
    "signal-and-noise": (
        gda(4, 2),
        {"signal_heads": "x4", "noise_heads": "x2"},
        [("signal", 4), ("noise", 2)],
    ),
    "uniform-and-signal": (
        gda(4, 2),
        {"uniform_heads": "x2", "signal_heads": "x2"},
        [("uniform", 2), ("signal", 2)],
    ),
    "everything": (
        gda(4, 2, **TIED, **POLY),
        {"untie_embeddings": True, "signal_heads": "x2", "ffn": "x2", "hidden": "x2"}
        | {"layers": "x2"},
        [("untie", 1), ("signal", 2), ("ffn", 2), ("hidden", 2), ("depth", [0, 1])],
    ),
}


def grown_folder(
    tmp_path: Path, config: tiny.Config, dtype: str, shards: int, **request: Any
) -> tuple[tiny.Tensors, tiny.Config, tiny.Tensors]:
    """(source tensors, grown config, grown tensors)."""
    source = tiny.make_tensors(config, dtype)
    tiny.write_folder(tmp_path / "a", config, source, shards=shards)
    size = "5GB" if shards == 1 else "3KB"
    tiny.grow(tmp_path / "a", tmp_path / "b", max_shard_size=size, **request)
    return source, tiny.read_config(tmp_path / "b"), tiny.read_folder(tmp_path / "b")


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("BF16", 3)])
@pytest.mark.parametrize("case", CASES)
def test_even_growth_is_the_oracles_bit_for_bit(
    tmp_path: Path, case: str, dtype: str, shards: int
) -> None:
    config, request, steps = CASES[case]
    source, _, grown = grown_folder(tmp_path, config, dtype, shards, symmetry="even", **request)
    model = oracle.load(config, source)
    for step, amount in steps:
        model = getattr(oracle, step)(model, amount)
    expected = oracle.store(model, halves=config["model_type"] == "diffllama")
    assert expected.keys() == grown.keys()
    for name in expected:
        assert tiny.same_bits(expected[name], grown[name]), name


@pytest.mark.parametrize(("dtype", "shards"), [("F16", 1), ("BF16", 3)])
@pytest.mark.parametrize("case", CASES)
def test_split_growth_folds_back_bit_for_bit(
    tmp_path: Path, case: str, dtype: str, shards: int
) -> None:
    config, request, steps = CASES[case]
    source, grown_config, grown = grown_folder(tmp_path, config, dtype, shards, **request)
    model = oracle.load(grown_config, grown)
    for step, amount in reversed(steps):
        model = getattr(oracle, f"fold_{step}")(model, amount)
    folded = oracle.store(model, halves=config["model_type"] == "diffllama")
    assert folded.keys() == source.keys()
    for name, old in source.items():
        assert (folded[name].astype(np.float64) == old.astype(np.float64)).all(), name


def test_the_fold_sees_one_changed_bit(tmp_path: Path) -> None:
    """Negative controls: one rounding in one column, and two rows exchanged."""
    config, request, _ = CASES["signal-2:1"]
    source, grown_config, grown = grown_folder(tmp_path, config, "BF16", 1, **request)
    name = "model.layers.1.self_attn.o_proj.weight"
    grown[name].view(np.uint16)[3, 5] ^= 1
    folded = oracle.store(oracle.fold_signal(oracle.load(grown_config, grown), 2))
    assert (folded[name] != source[name].astype(np.float64)).sum() == 1
    grown["model.layers.0.self_attn.q_proj.weight"][[0, 8]] = grown[
        "model.layers.0.self_attn.q_proj.weight"
    ][[8, 0]]
    with pytest.raises(AssertionError, match="copies of a producer differ"):
        oracle.fold_signal(oracle.load(grown_config, grown), 2)


@pytest.mark.parametrize("shards", [1, 2])
def test_new_heads_and_units_with_zero_output(tmp_path: Path, shards: int) -> None:
    """Old rows and columns keep their bits; what reads the new ones is zero; they are random."""
    config = gda(4, 2, 1)
    source, grown_config, grown = grown_folder(
        tmp_path,
        config,
        "BF16",
        shards,
        signal_heads="+2",
        ffn="+5",
        new_heads="zero",
        new_units="zero",
    )
    old, new = oracle.load(config, source), oracle.load(grown_config, grown)
    for before, after in zip(old.layers, new.layers, strict=True):
        # Groups of (2 signal, 1 noise) became (3 signal, 1 noise); the last signal head is new.
        qs = after.qs.reshape(2, 3, *after.qs.shape[1:])
        o = after.o.reshape(len(after.o), 2, 3, -1)
        assert (qs[:, :2].reshape(before.qs.shape) == before.qs).all()
        assert (o[:, :, :2].reshape(before.o.shape) == before.o).all()
        assert not o[:, :, 2].any()
        assert (after.qn == before.qn).all()
        assert (after.gate[:12] == before.gate).all() and (after.up[:12] == before.up).all()
        assert (after.down[:, :12] == before.down).all() and not after.down[:, 12:].any()
        for fresh in (qs[:, 2], after.gate[12:], after.up[12:]):
            assert abs(float(fresh.astype(np.float32).std()) / tiny.STD - 1) < 0.4
            assert len(np.unique(fresh.astype(np.float32))) > 30


@pytest.mark.parametrize("target", ["+5", "17", "x1.5"])
def test_uneven_ffn_copies_spread_and_sum(tmp_path: Path, target: str) -> None:
    source, _, grown = grown_folder(tmp_path, llama(), "F32", 1, ffn=target)
    for i in range(2):
        at = f"model.layers.{i}.mlp."
        width = grown[at + "gate_proj.weight"].shape[0]
        of = [unit * 12 // width for unit in range(width)]
        assert (grown[at + "gate_proj.weight"] == source[at + "gate_proj.weight"][of]).all()
        down = np.zeros((16, 12))
        for unit, old in enumerate(of):
            down[:, old] += grown[at + "down_proj.weight"][:, unit]
        assert (down == source[at + "down_proj.weight"]).all()


def test_odd_uniform_growth_stays_inside_its_kv_pair(tmp_path: Path) -> None:
    """Four groups on two pairs to six: 0, 0, 1 on the first pair, 2, 2, 3 on the second."""
    config = gda(4, 4, 2)
    source, grown_config, grown = grown_folder(tmp_path, config, "F32", 1, uniform_heads="x1.5")
    old, new = oracle.load(config, source), oracle.load(grown_config, grown)
    of = [0, 0, 1, 2, 2, 3]
    assert (new.layers[0].qs == old.layers[0].qs[of]).all()
    assert (new.layers[0].qn == old.layers[0].qn[of]).all()
    summed = np.zeros(old.layers[0].o.shape)
    for head, source_head in enumerate(of):
        summed[:, source_head] += new.layers[0].o[:, head]
    assert (summed == old.layers[0].o).all()


@pytest.mark.parametrize(
    ("request_", "order"),
    [
        ({"layers": "x2", "depth_method": "stack"}, [0, 1, 2, 3, 0, 1, 2, 3]),
        ({"layers": "6", "depth_method": "interpolate"}, [0, 0, 1, 2, 2, 3]),
        ({"layers": "6", "depth_method": "solar"}, [0, 1, 2, 1, 2, 3]),
    ],
)
def test_depth_methods_that_are_not_exact(
    tmp_path: Path, request_: dict[str, Any], order: list[int]
) -> None:
    config = gda(num_hidden_layers=4)
    source, grown_config, grown = grown_folder(tmp_path, config, "BF16", 1, **request_)
    assert grown_config["lambda_init"] == [config["lambda_init"][i] for i in order]
    for new, old in enumerate(order):
        for name in (n for n in source if f"layers.{old}." in n):
            assert tiny.same_bits(
                grown[name.replace(f"layers.{old}.", f"layers.{new}.")], source[name]
            )
