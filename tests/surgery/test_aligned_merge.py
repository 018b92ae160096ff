"""Key/value heads merged after an alignment: the turn alone is exact and finds what is alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from converted import convert, difference, logits, write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.surgery.effect import ModelShape
from growkit.surgery.plan import read_source
from growkit.variants.gqa.aligned import turned
from growkit.variants.gqa.alignment import (
    FILE,
    Alignment,
    aligned_angles,
    aligned_bases,
    read_alignment,
)
from growkit.variants.request import ConversionRequest

DIM, HALF = 8, 4
Array = np.ndarray[Any, Any]


def orthogonal(rng: np.random.Generator, *leading: int) -> Array:
    return np.linalg.qr(rng.standard_normal((*leading, DIM, DIM)))[0]


def random_alignment(layers: int, heads: int) -> Alignment:
    rng = np.random.default_rng(0)
    angles = rng.uniform(-np.pi, np.pi, (layers, heads, HALF))
    return Alignment(angles, orthogonal(rng, layers, heads), 1)


class General(Alignment):
    """Keys and queries turned by any orthogonal matrix: does not commute with RoPE."""

    def keys(self, layer: int) -> Array:
        return self.values[layer]


class Neighbours(Alignment):
    """The rotations of the pairs (2i, 2i + 1), which are not the pairs of the rotary embedding."""

    def keys(self, layer: int) -> Array:
        order = np.arange(DIM).reshape(2, HALF).T.reshape(-1)
        return super().keys(layer)[:, order][:, :, order]


@torch.no_grad()
def change(folder: Path, alignment: Alignment, roles: str = "qkvo") -> float:
    """Largest |d logit| in float64 when heads are only turned."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(80).reshape(2, 40) * 7 % 256
    before = model(ids).logits
    with open_checkpoint(folder) as checkpoint:
        family, sizes = read_source(checkpoint)
        shape = ModelShape(family, sizes, checkpoint.config)
        for role, computed in turned(shape, alignment, 1).items():
            tensor = family.tensor(role)
            assert tensor is not None
            for layer in range(sizes["layer"] if role[0] in roles else 0):
                weight = model.get_parameter(tensor.name.replace("{layer}", str(layer)))
                rows = computed.rows(checkpoint, layer, 0, len(weight))
                weight.copy_(torch.from_numpy(rows.reshape(weight.shape)))
    return float((model(ids).logits - before).abs().max())


@pytest.mark.parametrize("source", ["gqa", "mha", "mqa", "biases", "mistral", "qwen2"])
def test_the_turn_alone_is_exact(tmp_path: Path, source: str) -> None:
    folder = write_source(tmp_path / "a", source)
    alignment = random_alignment(2, tiny.read_config(folder)["num_key_value_heads"])
    assert change(folder, alignment) < 1e-12
    for control in (General, Neighbours):
        other = control(alignment.angles, alignment.values, 1)
        assert change(folder, other) > 1e-3, control.__name__
    for left_out in ("qkv", "qvo", "kvo"):
        assert change(folder, alignment, left_out) > 1e-3, left_out


def test_norms_of_heads_let_only_pairs_of_equal_gains_turn(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "qwen3")
    alignment = random_alignment(2, 2)
    assert change(folder, alignment) > 1e-3
    values = Alignment(np.zeros_like(alignment.angles), alignment.values, 1)
    assert change(folder, values) < 1e-12
    equal = with_tensors(folder, tmp_path / "equal", equal_gains)
    # The class norms heads in float32 whatever the model is in.
    assert change(equal, alignment) < 1e-5


def with_tensors(folder: Path, out: Path, edit: Callable[[dict[str, Array]], None]) -> Path:
    tensors = tiny.read_folder(folder)
    edit(tensors)
    return tiny.write_folder(out, tiny.read_config(folder), tensors)


def equal_gains(tensors: dict[str, Array]) -> None:
    for name, tensor in tensors.items():
        if "q_norm" in name or "k_norm" in name:
            tensor[HALF:] = tensor[:HALF]


def turned_copies(group: int, *, keys: bool) -> Callable[[dict[str, Array]], None]:
    """Every head of a group is the group's first, turned by a random rotation."""

    def edit(tensors: dict[str, Array]) -> None:
        rng = np.random.default_rng(1)
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn."
            heads = len(tensors[prefix + "k_proj.weight"]) // DIM
            alignment = random_alignment(1, heads)
            turns = {"k": alignment.keys(0), "v": orthogonal(rng, heads)}
            for kind, turn in turns.items():
                for part in ("weight", "bias"):
                    tensor = tensors.get(f"{prefix}{kind}_proj.{part}")
                    if tensor is None:
                        continue
                    whole = tensor.reshape(heads, DIM, -1)
                    for head in range(heads):
                        first = whole[head - head % group].astype(np.float64)
                        if head % group:
                            whole[head] = turn[head] @ first if kind == "v" or keys else first

    return edit


CASES = [
    ("mha", 2, True),
    ("mha", 1, True),
    ("biases", 1, True),
    ("mistral", 1, True),
    ("qwen2", 1, True),
    ("qwen3", 1, False),
    ("qwen3 equal gains", 1, True),
]


@pytest.mark.parametrize(("source", "heads", "keys"), CASES)
def test_heads_that_are_turns_of_each_other_merge_exactly(
    tmp_path: Path, source: str, heads: int, keys: bool
) -> None:
    folder = write_source(tmp_path / "source", source.split()[0])
    group = tiny.read_config(folder)["num_key_value_heads"] // heads
    if "equal" in source:
        folder = with_tensors(folder, tmp_path / "equal", equal_gains)
    folder = with_tensors(folder, tmp_path / "a", turned_copies(group, keys=keys))
    before = logits(folder)
    plan = convert(folder, tmp_path / "b", "gqa", kv_heads=heads, merge="aligned")
    assert plan.exactness.value == "not-exact" and "aligned" in plan.growth.steps[0].summary
    assert difference(before, logits(tmp_path / "b")) < 2e-5
    convert(folder, tmp_path / "mean", "gqa", kv_heads=heads)
    assert difference(before, logits(tmp_path / "mean")) > 0.01


def test_turned_keys_behind_unequal_gains_are_left_and_that_is_said(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "qwen3")
    plan = convert(folder, tmp_path / "b", "mqa", merge="aligned")
    assert "no pair of keys could be rotated" in plan.growth.steps[0].summary
    assert not read_alignment(tmp_path / "b").angles.any()


@torch.no_grad()
def spread(folder: Path, alignment: Alignment | None) -> float:
    """Mean squared distance of values and keys to their mean over all heads, on other tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []

    def hook(layer: int, kind: str) -> Any:
        def take(module: Any, given: Any, result: torch.Tensor) -> None:
            heads = result.reshape(-1, result.shape[-1] // DIM, DIM)
            if alignment is not None:
                turn = alignment.keys(layer) if kind == "k" else alignment.values[layer]
                heads = torch.einsum("hij,thj->thi", torch.from_numpy(turn), heads)
            found.append((heads - heads.mean(dim=1, keepdim=True)).square().mean().item())

        return take

    for layer, block in enumerate(model.model.layers):
        block.self_attn.k_proj.register_forward_hook(hook(layer, "k"))
        block.self_attn.v_proj.register_forward_hook(hook(layer, "v"))
    model(torch.arange(200)[None] * 11 % 128)
    return float(np.mean(found))


def test_heads_of_an_ordinary_model_come_closer_on_other_tokens(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "mha")
    convert(folder, tmp_path / "b", "mqa", merge="aligned")
    assert spread(folder, read_alignment(tmp_path / "b")) < 0.95 * spread(folder, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_turned_copies_are_found(seed: int, heads: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((40, DIM))
    turns = orthogonal(rng, heads)
    copies = np.stack([data @ turn.T for turn in turns])
    bases = aligned_bases(np.einsum("atc,btd->acbd", copies, copies))
    back = np.einsum("htc,hdc->htd", copies, bases)
    np.testing.assert_allclose(back, back[:1].repeat(heads, axis=0), atol=1e-8)
    pairs = rng.standard_normal((40, HALF)) + 1j * rng.standard_normal((40, HALF))
    angles = rng.uniform(-np.pi, np.pi, (heads, 1, HALF))
    states = pairs * np.exp(1j * angles)
    found = aligned_angles(np.einsum("atp,btp->pab", states.conj(), states))
    same = states * np.exp(1j * found[:, None])
    np.testing.assert_allclose(same, same[:1].repeat(heads, axis=0), atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_two_heads_get_the_best_turn_that_there_is(seed: int) -> None:
    """Against the nuclear norm of their product, and a grid of 3600 angles."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 30, DIM))
    both = np.stack([a, b])
    one, other = aligned_bases(np.einsum("atc,btd->acbd", both, both))
    found = np.sum((a @ one.T) * (b @ other.T))
    assert found == pytest.approx(np.linalg.svd(a.T @ b, compute_uv=False).sum())
    states = np.stack([a[:, :1] + 1j * a[:, 1:2], b[:, :1] + 1j * b[:, 1:2]])
    angles = aligned_angles(np.einsum("atp,btp->pab", states.conj(), states))
    inner = (states[0].conj() * states[1]).sum()
    grid = (inner * np.exp(1j * np.linspace(0, 2 * np.pi, 3600))).real.max()
    assert (inner * np.exp(1j * (angles[1, 0] - angles[0, 0]))).real >= grid - 1e-9


def as_planned(a: Path, b: Path) -> Any:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return diff_checkpoints(first, second)["as_grown"]


def test_the_cli_writes_a_folder_that_diff_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_source(tmp_path / "a", "qwen2", "BF16")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    command = ["convert", str(folder), "--to", "mqa", "--merge", "aligned"]
    command += ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "b")]
    assert main(command) == 0
    assert "aligned" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "b/growkit.json").read_text())
    assert manifest["request"] == {"convert": {"to": "mqa", "merge": "aligned"}}
    assert manifest["plan"]["exactness"] == "not-exact"
    assert main(["diff", str(folder), str(tmp_path / "b")]) == 0
    assert "every part is what its plan says" in capsys.readouterr().out
    other = read_alignment(tmp_path / "b")
    wrong = Alignment(other.angles + 0.1, other.values, other.tokens)
    (tmp_path / "b" / FILE).write_bytes(wrong.to_bytes())
    assert as_planned(folder, tmp_path / "b") is False
    (tmp_path / "b" / FILE).write_bytes(b"PK damaged")
    assert as_planned(folder, tmp_path / "b") is None
    (tmp_path / "b" / FILE).unlink()
    assert as_planned(folder, tmp_path / "b") is None


def test_the_folders_tokenizer_makes_the_tokens(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "gqa")
    convert(folder, tmp_path / "bytes", "mqa", merge="aligned")
    tokenizer = Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)} | {"?": 26}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    convert(folder, tmp_path / "b", "mqa", merge="aligned")
    one, other = (read_alignment(tmp_path / name) for name in ("bytes", "b"))
    assert one.tokens == other.tokens == 4096
    assert not np.allclose(one.angles, other.angles)


def test_shards_and_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "mha")
    convert(folder, tmp_path / "b", "mqa", merge="aligned")
    convert(folder, tmp_path / "c", "mqa", merge="aligned", threads=3, max_shard_size="9KB")
    one, other = (tiny.read_folder(tmp_path / name) for name in "bc")
    assert all(tiny.same_bits(one[name], other[name]) for name in one)
    assert (tmp_path / "b" / FILE).read_bytes() == (tmp_path / "c" / FILE).read_bytes()
    with open_checkpoint(folder) as checkpoint:
        family, sizes = read_source(checkpoint)
        shape = ModelShape(family, sizes, checkpoint.config)
        for computed in turned(shape, read_alignment(tmp_path / "b"), 4).values():
            rows = computed.rows(checkpoint, 1, 0, DIM)
            parts = [computed.rows(checkpoint, 1, first, 1) for first in range(DIM)]
            np.testing.assert_array_equal(rows, np.concatenate(parts))


REFUSED = {
    "other target": ("gqa", ["--to", "wgqa", "--merge", "aligned"], "--to gqa or --to mqa"),
    "none merged": ("gqa", ["--to", "gqa", "--kv-heads", "4", "--merge", "aligned"], "merges none"),
    "unknown": ("gqa", ["--to", "mqa", "--merge", "alined"], "aligned"),
    "text for mean": ("gqa", ["--to", "mqa", "--text", "a.txt"], "--merge aligned only"),
    "no text": ("gqa", ["--to", "mqa", "--merge", "aligned", "--text", "none"], "not a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_said_and_leaves_nothing(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, arguments, words = REFUSED[name]
    folder = write_source(tmp_path / "a", source)
    assert main(["convert", str(folder), *arguments, "--out", str(tmp_path / "b")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_other_position_embeddings_are_refused(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "mha")
    config = tiny.read_config(folder) | {"partial_rotary_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="full rotary"):
        convert(folder, tmp_path / "b", "mqa", merge="aligned")
    with pytest.raises(UsageError, match="--to gqa"):
        ConversionRequest(to="gda", merge="aligned")
