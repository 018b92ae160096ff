"""Every conversion through transformers on the written files: the label is what is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
import variant_checkpoints
from converted import LAYERS, SOURCES, allowed, convert, difference, logits, write_source
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.diff.folders import diff_checkpoints
from growkit.record.manifest import read_manifest
from growkit.surgery.effect import ModelShape
from growkit.variants.plain.maps import FoldedHeads

Config = dict[str, Any]
Request = dict[str, Any]
# Conversion -> (request, label that it promises on every source that it takes).
EXACT: dict[str, tuple[Request, str]] = {
    "mha": ({"to": "mha"}, "bit-exact"),
    "gda": ({"to": "gda"}, "bit-exact"),
    "gda 1:1": ({"to": "gda", "ratio": 1}, "bit-exact"),
    "gda mirror 1/2": ({"to": "gda", "mirror": 0.5}, "exact"),
    "gda mirror 0.3": ({"to": "gda", "mirror": 0.3}, "rounded"),
    "gda_gated": ({"to": "gda_gated"}, "bit-exact"),
    "gda_gated 3:1": ({"to": "gda_gated", "ratio": 3}, "exact"),
    "diff_v2": ({"to": "diff_v2"}, "bit-exact"),
    "shared_diff": ({"to": "shared_diff", "rank": 2}, "exact"),
    "shared_diff 0.3": ({"to": "shared_diff", "rank": 2, "mirror": 0.3}, "rounded"),
    "shared_diff keys": ({"to": "shared_diff", "rank": 2, "key_rank": 3}, "exact"),
    "wgqa": ({"to": "wgqa"}, "exact"),
    "wgqa column": ({"to": "wgqa", "wgqa_weights": "column"}, "exact"),
    "sas": ({"to": "sas"}, "exact"),
    "sas kernel 3": ({"to": "sas", "kernel": 3, "simulated_heads": 3}, "exact"),
    "sas wide": ({"to": "sas", "simulated_head_dim": 12}, "rounded"),
}
NOT_EXACT: dict[str, tuple[str, Request]] = {
    "gqa mean": ("mha", {"to": "gqa", "kv_heads": 2}),
    "gqa first": ("mha", {"to": "gqa", "kv_heads": 2, "merge": "first"}),
    "mqa": ("gqa", {"to": "mqa"}),
    "mqa biases": ("qwen2", {"to": "mqa"}),
    "wgqa fewer": ("mha", {"to": "wgqa", "kv_heads": 1}),
    "diff_v1": ("mha", {"to": "diff_v1"}),
}
FOLDS: dict[str, tuple[str, Request]] = {
    "gda": ("tied", {"to": "gda", "mirror": 0.3}),
    "gda qwen3": ("qwen3", {"to": "gda", "mirror": 0.3}),
    "gda qwen2": ("qwen2", {"to": "gda", "mirror": 0.3}),
    "shared_diff": ("tied", {"to": "shared_diff", "rank": 2}),
    "shared_diff qwen3": ("qwen3", {"to": "shared_diff", "rank": 3, "mirror": 0.3}),
    "shared_diff keys": ("gqa", {"to": "shared_diff", "rank": 2, "key_rank": 3}),
    "shared_diff keys, biases": ("qwen2", {"to": "shared_diff", "rank": 2, "key_rank": 1}),
    "wgqa scalar": ("gqa", {"to": "wgqa"}),
    "wgqa column": ("qwen2", {"to": "wgqa", "wgqa_weights": "column"}),
    "wgqa row": ("gqa", {"to": "wgqa", "wgqa_weights": "row"}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, dtype) -> (folder, logits), each made once."""
    folder = tmp_path_factory.mktemp("sources")

    @cache
    def source(name: str, dtype: str = "F32") -> tuple[Path, torch.Tensor]:
        path = write_source(folder / f"{name}-{dtype}", name, dtype)
        return path, logits(path)

    return source


# Every conversion on two kinds of source, so that every source meets several conversions.
PAIRS = [
    (name, list(SOURCES)[(index + shift) % len(SOURCES)], dtype)
    for index, name in enumerate(EXACT)
    for shift, dtype in ((0, "F32"), (3, "BF16"))
]


@pytest.mark.parametrize(("name", "source", "dtype"), PAIRS)
def test_the_label_is_what_is_measured(
    sources: Any, tmp_path: Path, name: str, source: str, dtype: str
) -> None:
    request, label = EXACT[name]
    folder, before = sources(source, dtype)
    plan = convert(folder, tmp_path / "b", **request)
    assert plan.exactness.value == label
    found = difference(before, logits(tmp_path / "b"))
    limit = allowed(before, dtype, rounded=label == "rounded")
    assert found <= (limit / 4 if label == "bit-exact" else limit)


@pytest.mark.parametrize("name", NOT_EXACT)
def test_not_exact_is_said_and_true(sources: Any, tmp_path: Path, name: str) -> None:
    source, request = NOT_EXACT[name]
    folder, before = sources(source)
    plan = convert(folder, tmp_path / "b", **request)
    assert plan.exactness.value == "not-exact"
    assert difference(before, logits(tmp_path / "b")) > 10 * allowed(before)


def test_mean_pool_is_the_mean_of_the_group(sources: Any, tmp_path: Path) -> None:
    folder, _ = sources("mha")
    convert(folder, tmp_path / "b", to="gqa", kv_heads=2)
    for kind in ("k", "v"):
        name = f"model.layers.1.self_attn.{kind}_proj.weight"
        old = tiny.read_folder(folder)[name].reshape(2, 2, 8, 32).astype(np.float64)
        new = tiny.read_folder(tmp_path / "b")[name].reshape(2, 8, 32)
        np.testing.assert_array_equal(new, old.mean(axis=1).astype(np.float32))


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_trained_variant_folds_into_an_ordinary_class(
    sources: Any, tmp_path: Path, name: str, dtype: str
) -> None:
    """Folded after its new parameters moved: lambda of every layer, weights of every head."""
    source, request = FOLDS[name]
    convert(sources(source, dtype)[0], tmp_path / "b", **request)
    moved = _move(tmp_path / "b", tmp_path / "moved")
    before = logits(moved)
    assert difference(before, sources(source, dtype)[1]) > 100 * allowed(before)
    plan = convert(moved, tmp_path / "folded", to="plain")
    config = tiny.read_config(tmp_path / "folded")
    assert config["model_type"] in ("mistral", "qwen2", "qwen3") and "auto_map" not in config
    assert plan.exactness.value == "rounded"
    after = logits(tmp_path / "folded")
    if "shared_diff" in name and dtype == "BF16":
        # 8 bits of the scores' weights are more than the tolerance of random models
        assert_updates_multiplied_out(moved, tmp_path / "folded")
    else:
        assert difference(before, after) <= allowed(before, dtype, rounded=True)


def assert_updates_multiplied_out(folder: Path, folded: Path) -> None:
    """Every query head of the folded model is W + U D of its map, rounded once."""
    config, old, new = tiny.read_config(folder), tiny.read_folder(folder), tiny.read_folder(folded)
    rank, parts = config["query_rank"], 2 if config["key_rank"] else 1
    pairs = config["num_key_value_heads"] // parts
    heads = config["num_attention_heads"] // 2
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_"
        base, down, up = (old[name + w + ".weight"].astype(float) for w in ("proj", "down", "up"))
        expected = []
        for pair in range(pairs):
            group = range(pair * heads // pairs, (pair + 1) * heads // pairs)
            for at in parts * [(head, which) for which in (0, 1) for head in group]:
                row = 2 * at[0] + at[1]
                update = up[8 * row : 8 * row + 8] @ down[rank * row : rank * row + rank]
                expected.append(base[8 * at[0] : 8 * at[0] + 8] + update)
        written = new[name + "proj.weight"]
        assert (written == np.concatenate(expected).astype(written.dtype)).all()


NO_BIAS: Config = {"attention_bias": False, "attention_output_bias": False}
OWN_KEYS: dict[str, Config] = {
    "diff_v1": variant_checkpoints.SIZES | variant_checkpoints.VARIANTS["diff_v1-plain"],
    **{
        f"gda {signal}:{noise}:{pairs}": tiny.gda_config(
            signal, noise, pairs, num_hidden_layers=LAYERS, sub_layer_norm=False
        )
        for signal, noise, pairs in ((4, 4, 2), (6, 2, 2), (8, 2, 1), (2, 4, 2), (1, 3, 1))
    },
}


def write_own_keys(path: Path, name: str) -> Path:
    if name == "diff_v1":
        return variant_checkpoints.write_variant(path, "diff_v1-plain")
    return tiny.make_folder(path, OWN_KEYS[name])


@pytest.mark.parametrize("name", OWN_KEYS)
def test_maps_with_keys_of_their_own_fold_too(tmp_path: Path, name: str) -> None:
    """Values two heads wide; ratios below and above 1:1."""
    folder = write_own_keys(tmp_path / "a", name)
    before = logits(folder)
    plan = convert(folder, tmp_path / "folded", to="plain")
    config = tiny.read_config(tmp_path / "folded")
    assert config["model_type"] == "mistral" and plan.exactness.value == "rounded"
    assert difference(before, logits(tmp_path / "folded")) <= allowed(before, rounded=True)


def test_control_a_fold_with_the_halves_of_a_value_exchanged_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_own_keys(tmp_path / "a", "gda 6:2:2")
    before, right = logits(folder), FoldedHeads.of

    def exchanged(shape: ModelShape) -> FoldedHeads:
        heads = right(shape)
        return replace(heads, value=heads.value ^ 1)

    monkeypatch.setattr(FoldedHeads, "of", exchanged)
    convert(folder, tmp_path / "folded", to="plain")
    assert difference(before, logits(tmp_path / "folded")) > 10 * allowed(before)


@pytest.mark.parametrize(
    ("name", "words"),
    [("diff_v1", "normalises the output"), ("diff_v2", "depends on the token"), ("sas", "ReLU")],
)
def test_what_is_not_linear_in_its_maps_is_not_folded(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = variant_checkpoints.write_variant(tmp_path / "a", name, **NO_BIAS)
    out = tmp_path / "folded"
    assert main(["export", str(folder), "--fold", "--out", str(out)]) == 2
    assert words in " ".join(capsys.readouterr().err.split()) and not out.exists()


def _move(folder: Path, out: Path) -> Path:
    """As if trained: other lambda vectors in each layer, other noise heads, other merge weights."""
    tensors, rng = tiny.read_folder(folder), np.random.default_rng(1)
    for name, tensor in tensors.items():
        if "lambda_" in name or ".w_" in name or "q_proj" in name or "_up.weight" in name:
            size = 0.1 if "_up.weight" in name else 0.3
            noise = size * rng.standard_normal(tensor.shape)
            tensors[name] = (tensor.astype(np.float32) + noise).astype(tensor.dtype)
    return tiny.write_folder(out, tiny.read_config(folder), tensors)


GROWTHS: dict[str, tuple[str, Request, Request]] = {
    "gda": ("tied", {"to": "gda", "ratio": 2}, {"signal_heads": "x2"}),
    "diff_v2": ("qwen3", {"to": "diff_v2"}, {"signal_heads": "x2", "noise_heads": "x2"}),
    "wgqa": ("qwen2", {"to": "wgqa"}, {"query_heads": "x2"}),
    "sas": ("gqa", {"to": "sas"}, {"ffn": "x2", "layers": "+1"}),
}


@pytest.mark.parametrize("name", GROWTHS)
def test_a_converted_model_grows_and_still_is_the_original(
    sources: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, request, growth = GROWTHS[name]
    folder, _ = sources(source)
    convert(folder, tmp_path / "b", **request)
    tiny.grow(tmp_path / "b", tmp_path / "c", **growth)
    assert main(["verify", str(folder), str(tmp_path / "c"), "--quiet"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["gda", "wgqa", "sas", "diff_v2"])
def test_threads_and_shards_do_not_change_a_bit(sources: Any, tmp_path: Path, name: str) -> None:
    folder, _ = sources("gqa")
    request, _ = EXACT[name]
    convert(folder, tmp_path / "b", **request)
    convert(folder, tmp_path / "c", **request, threads=3, max_shard_size="9KB")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    one, other = (tiny.read_folder(tmp_path / name) for name in "bc")
    assert one.keys() == other.keys()
    assert all(tiny.same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("source", "to", "tensor"),
    [
        ("mha", "mqa", "k_proj.weight"),
        ("gqa", "sas", "simulate_v.heads.weight"),
        ("qwen2", "wgqa", "w_k"),
        ("gqa", "gda", "o_proj.weight"),
    ],
)
def test_diff_knows_a_conversion_and_one_wrong_bit_in_it(
    sources: Any, tmp_path: Path, source: str, to: str, tensor: str
) -> None:
    folder, _ = sources(source)
    convert(folder, tmp_path / "b", to)
    assert _as_planned(folder, tmp_path / "b") is True
    tensors = tiny.read_folder(tmp_path / "b")
    name = next(n for n in tensors if "layers.1." in n and n.endswith(tensor))
    tensors[name].view(np.uint32).reshape(-1)[-1] ^= 1
    tiny.write_folder(tmp_path / "c", tiny.read_config(tmp_path / "b"), tensors)
    (tmp_path / "c/growkit.json").write_bytes((tmp_path / "b/growkit.json").read_bytes())
    assert _as_planned(folder, tmp_path / "c") is False


def _as_planned(a: Path, b: Path) -> Any:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return diff_checkpoints(first, second)["as_grown"]


@pytest.mark.parametrize(
    ("to", "new", "old"),
    [
        ("gda", ("lambda_q1", "q_proj.weight"), ("k_proj.weight", "o_proj.weight")),
        ("diff_v2", ("lambda_proj.weight",), ("o_proj.weight",)),
        ("shared_diff", ("q_up", "q_down", "lambda_k1"), ("k_proj.weight",)),
        ("wgqa", ("w_k", "w_v"), ("o_proj.weight",)),
        ("sas", ("simulate_q.heads.weight", "simulate_v.heads.bias"), ("q_proj.weight",)),
    ],
)
def test_new_parameters_are_in_the_manifest(
    sources: Any, tmp_path: Path, to: str, new: tuple[str, ...], old: tuple[str, ...]
) -> None:
    convert(sources("gqa")[0], tmp_path / "b", to, **({"rank": 2} if to == "shared_diff" else {}))
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    names = {name.split("self_attn.")[-1] for name in manifest["new_parameters"]}
    assert all(any(n.startswith(name) for n in names) for name in new), names
    assert not names & set(old)


@pytest.mark.parametrize(
    ("to", "vectors"),
    [
        ("gda", ("lambda_k1", "lambda_k2")),
        ("shared_diff", ("lambda_k1", "lambda_k2")),
        ("diff_v1", ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")),
    ],
)
@pytest.mark.parametrize("stated", [{}, {"lambda_std": 0.3}], ids=["default", "stated"])
def test_lambda_vectors_begin_as_in_a_new_model(
    sources: Any, tmp_path: Path, to: str, vectors: tuple[str, ...], stated: dict[str, float]
) -> None:
    """Not with initializer_range: the gradient of lambda is as large as they are."""
    tensors = tiny.read_folder(sources("gqa")[0])
    config = tiny.read_config(sources("gqa")[0]) | {"initializer_range": 0.02, **stated}
    folder = tiny.write_folder(tmp_path / "a", config, tensors)
    convert(folder, tmp_path / "b", to, **({"rank": 2} if to == "shared_diff" else {}))
    written = tiny.read_folder(tmp_path / "b")
    found = np.stack([v for name, v in written.items() if name.endswith(vectors)])
    assert found.dtype == np.float32 and len(found) == LAYERS * len(vectors)
    scratch = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "b"))
    new = torch.cat([v for name, v in scratch.state_dict().items() if name.endswith(vectors)])
    assert found.std() == pytest.approx(stated.get("lambda_std", 0.1), rel=0.35)
    assert found.std() == pytest.approx(float(new.std()), rel=0.6)
    zeros = [v for name, v in written.items() if "lambda_" in name and not name.endswith(vectors)]
    assert not any(v.any() for v in zeros)


@pytest.mark.parametrize("target", ["mha", "mqa"])
def test_key_value_heads_that_are_merged_by_weights_are_refused(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = variant_checkpoints.write_variant(tmp_path / "a", "wgqa")
    assert main(["convert", str(folder), "--to", target, "--out", str(tmp_path / "b")]) == 2
    assert "Fold it first" in capsys.readouterr().err and not (tmp_path / "b").exists()
