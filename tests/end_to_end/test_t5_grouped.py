"""T5 with grouped attention in its decoder: converted, folded, grown, loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import write_t5
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from growkit.checkpoint import copy_side_files, open_checkpoint
from growkit.cli.main import main
from growkit.converting import convert_checkpoint
from growkit.core.errors import UsageError
from growkit.growing import grow_checkpoint
from growkit.record.inspect import inspect_checkpoint
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest
from growkit.variants.request import ConversionRequest
from growkit.verification import verify_checkpoints

Tensors = dict[str, torch.Tensor]
HEADS, DIM = 4, 12
ATTENTIONS = ("layer.0.SelfAttention", "layer.1.EncDecAttention")
WEIGHTS = ("scalar", "column", "row")


def convert(source: Path, out: Path, to: str, **request: Any) -> tuple[Plan, Any]:
    return convert_checkpoint(source, out, ConversionRequest(to=to, **request), threads=1)


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def scatter_weights(tensors: Tensors) -> None:
    """Merge weights as after training: another one for every head and channel."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if ".w_" in name:
            tensor += 0.4 * torch.randn(tensor.shape, generator=generator)


def weighted(root: Path, kind: str = "scalar", **t5: Any) -> Path:
    """A WGQA T5 with four heads in two groups and trained merge weights."""
    source = write_t5(root / "t5", "v1.1", **t5)
    convert(source, root / "weighted", "wgqa", kv_heads=2, wgqa_weights=kind)
    return rewrite(root / "weighted", scatter_weights)


def logits(folder: Path) -> torch.Tensor:
    """Logits on a source and a target text; nothing may be missing."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(40).reshape(2, 20) * 7 % 256
    decoder_ids = torch.arange(24).reshape(2, 12) * 11 % 256
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, decoder_input_ids=decoder_ids).logits
    return found


def decoder_states(tensors: Tensors) -> list[str]:
    """Names of the decoder's key and value projections."""
    return [n for n in tensors if n.startswith("decoder.") and n[-9:] in (".k.weight", ".v.weight")]


# -- fewer key/value heads ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
@pytest.mark.parametrize("merge", ["mean", "first"])
def test_to_gqa_merges_the_decoders_heads_and_leaves_the_encoder(
    tmp_path: Path, kind: str, merge: str
) -> None:
    source = write_t5(tmp_path / "a", kind)
    plan, manifest = convert(source, tmp_path / "b", "gqa", kv_heads=2, merge=merge)
    assert plan.exactness.value == "not-exact"
    figures = manifest["verification"]
    assert figures["passed"] is None and figures["generation"]["cached_equals_uncached"]
    assert figures["perplexity_a"] != figures["perplexity_b"]
    assert any("uptraining" in warning for warning in manifest["plan"]["warnings"])
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "b"))
    assert len(decoder_states(before)) == 12
    for name, tensor in after.items():
        old = before[name]
        if name in decoder_states(before):
            groups = old.unflatten(0, (2, 2, DIM))
            old = (groups.mean(1) if merge == "mean" else groups[:, 0]).flatten(0, 1)
        torch.testing.assert_close(tensor, old, rtol=0, atol=1e-7)
    assert set(after) == set(before)
    plan, manifest = convert(tmp_path / "b", tmp_path / "c", "mha")
    assert plan.exactness.value == "bit-exact" and manifest["verification"]["passed"]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["model_type"] == "t5" and "auto_map" not in config
    assert torch.equal(logits(tmp_path / "c"), logits(tmp_path / "b"))


def test_between_numbers_of_heads(tmp_path: Path) -> None:
    source = write_t5(tmp_path / "a")
    convert(source, tmp_path / "mqa", "mqa")
    plan, _ = convert(tmp_path / "mqa", tmp_path / "two", "gqa", kv_heads=2)
    assert plan.exactness.value == "bit-exact"
    assert torch.equal(logits(tmp_path / "two"), logits(tmp_path / "mqa"))
    plan, _ = convert(source, tmp_path / "same", "gqa", kv_heads=HEADS)
    assert plan.config["model_type"] == "t5"
    assert torch.equal(logits(tmp_path / "same"), logits(source))


# -- weighted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
def test_to_wgqa_starts_at_the_mean_pool(tmp_path: Path, kind: str) -> None:
    source = write_t5(tmp_path / "a")
    plan, _ = convert(source, tmp_path / "w", "wgqa", kv_heads=1, wgqa_weights=kind)
    assert plan.exactness.value == "not-exact"
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    weights = [tensor for name, tensor in tensors.items() if ".w_" in name]
    assert len(weights) == 12 and all((w == 1 / HEADS).all() for w in weights)
    convert(source, tmp_path / "g", "mqa")
    torch.testing.assert_close(logits(tmp_path / "w"), logits(tmp_path / "g"), atol=1e-5, rtol=1e-5)


def test_one_half_instead_of_the_groups_share_is_seen(tmp_path: Path) -> None:
    """The constant of the released code, right only for pairs, is not the mean of four heads."""
    source = write_t5(tmp_path / "a")
    convert(source, tmp_path / "w", "wgqa", kv_heads=1)
    convert(source, tmp_path / "g", "mqa")

    def halves(tensors: Tensors) -> None:
        for name in tensors:
            if ".w_" in name:
                tensors[name].fill_(0.5)

    rewrite(tmp_path / "w", halves)
    assert (logits(tmp_path / "w") - logits(tmp_path / "g")).abs().max() > 0.05


@pytest.mark.parametrize("kind", WEIGHTS)
def test_to_wgqa_is_exact_with_as_many_heads(tmp_path: Path, kind: str) -> None:
    source = write_t5(tmp_path / "a", "v1.1")
    plan, manifest = convert(
        source, tmp_path / "w", "wgqa", kv_heads=HEADS, wgqa_weights=kind, symmetry="split"
    )
    assert plan.exactness.value == "exact" and manifest["verification"]["passed"]
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    assert all((w == 1).all() for name, w in tensors.items() if ".w_" in name)
    # From a decoder that shares heads already, the trained heads of a group add up to its head.
    convert(source, tmp_path / "g", "gqa", kv_heads=2)
    plan, manifest = convert(tmp_path / "g", tmp_path / "gw", "wgqa", wgqa_weights=kind)
    assert plan.exactness.value == "exact" and manifest["verification"]["passed"]
    name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    first, second = load_file(tmp_path / "gw" / "model.safetensors")[name].split(DIM)[:2]
    assert not torch.equal(first, second), "the heads of a group have to be able to part"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fold(tmp_path: Path, kind: str) -> None:
    source = weighted(tmp_path, kind)
    plan, manifest = convert(source, tmp_path / "f", "plain")
    assert plan.exactness.value == "rounded" and manifest["verification"]["passed"]
    assert manifest["verification"]["generation"]["equals_a"]
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["decoder_attention"] == "gqa" and "wgqa_weights" not in config
    # naive: merge by hand, one head at a time
    old, new = (load_file(p / "model.safetensors") for p in (source, tmp_path / "f"))
    for name in decoder_states(old):
        weights = old[name.replace(".k.weight", ".w_k").replace(".v.weight", ".w_v")]
        heads = old[name].double().split(DIM)
        for group, merged in enumerate(new[name].split(DIM)):
            total = torch.zeros(DIM, 32, dtype=torch.float64)
            for head in (2 * group, 2 * group + 1):
                w = weights[head].double()
                total += heads[head] * (w[:, None] if kind == "column" else w)
            torch.testing.assert_close(merged.double(), total, atol=1e-7, rtol=1e-6)
    assert not any(".w_" in name for name in new)


def test_fold_without_sharing_is_plain_t5(tmp_path: Path) -> None:
    source = write_t5(tmp_path / "a", "v1.1")
    convert(source, tmp_path / "w", "wgqa", kv_heads=HEADS, wgqa_weights="row")
    rewrite(tmp_path / "w", scatter_weights)
    plan, manifest = convert(tmp_path / "w", tmp_path / "f", "plain")
    assert plan.config["model_type"] == "t5" and manifest["verification"]["passed"]


@pytest.mark.parametrize("to", ["plain", "mha"])
@pytest.mark.parametrize("forgotten", [False, True], ids=["", "the rule forgotten"])
def test_plain_t5_brings_no_code(
    tmp_path: Path, to: str, forgotten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the code of this version nor a file that an older one had; the tokenizer's stays."""
    source = write_t5(tmp_path / "a", "v1.1")
    grouped = {"plain": {"to": "wgqa", "kv_heads": HEADS}, "mha": {"to": "mqa"}}[to]
    convert(source, tmp_path / "w", **grouped)
    assert (tmp_path / "w" / "wgqa_t5.py").is_file()
    (tmp_path / "w" / "of_an_older_version.py").write_text("x = 1")
    (tmp_path / "w" / "tokenizer_config.json").write_text('{"auto_map": {"A": ["words.W", null]}}')
    (tmp_path / "w" / "words.py").write_text("from .letters import x")
    (tmp_path / "w" / "letters.py").write_text("x = 1")
    if forgotten:
        monkeypatch.setattr(
            "growkit.growing.copy_side_files",
            lambda source, target, model_code, **more: copy_side_files(source, target, **more),
        )
    convert(tmp_path / "w", tmp_path / "f", to)
    found = sorted(path.name for path in (tmp_path / "f").glob("*.py"))
    assert (found == ["letters.py", "words.py"]) is not forgotten
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["model_type"] == "t5" and "auto_map" not in config
    (tmp_path / "f" / "tokenizer_config.json").unlink()
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "f", trust_remote_code=False)
    assert type(model) is T5ForConditionalGeneration


def weights_of_another_group(tensors: Tensors) -> None:
    for name in tensors:
        if "EncDecAttention.w_v" in name:
            tensors[name] = tensors[name].roll(2, 0).contiguous()


def merge_of_neighbours(tensors: Tensors) -> None:
    """A stride instead of consecutive heads: heads 0, 2 and 1, 3."""
    for name in tensors:
        if ".w_k" in name:
            tensors[name] = tensors[name][[0, 2, 1, 3]].contiguous()


def half_a_weight(tensors: Tensors) -> None:
    for name in tensors:
        if "block.2.layer.0.SelfAttention.w_v" in name:
            tensors[name].fill_(0.5)


@pytest.mark.parametrize("damage", [weights_of_another_group, merge_of_neighbours, half_a_weight])
def test_a_wrong_fold_fails_verification(tmp_path: Path, damage: Callable[[Tensors], None]) -> None:
    """The folded folder against a model with other weights: as if the fold had used those."""
    source = weighted(tmp_path)
    convert(source, tmp_path / "f", "plain")
    rewrite(source, damage)
    assert verify_checkpoints(source, tmp_path / "f").passed is False


# -- growth ---------------------------------------------------------------------------------------

REQUESTS: dict[str, dict[str, Any]] = {
    "both stacks": {"layers": "+1", "decoder_layers": "+1"},
    "together": {"query_heads": "x2", "ffn": "x2", "hidden": "x4", "decoder_layers": "+1"},
}
GROUPED = {
    "heads": {"heads": "x2"},
    "kv heads": {"kv_heads": "x2"},
    "head_dim": {"head_dim": "+4"},
}


@pytest.mark.parametrize(
    ("kind", "request_"),
    [(kind, "together") for kind in ("scalar", "column", "row")]
    + [("gqa", name) for name in {**GROUPED, "together": 0}]
    + [("scalar", "both stacks")],
)
def test_growth_keeps_the_function(tmp_path: Path, kind: str, request_: str) -> None:
    if kind == "gqa":
        source = tmp_path / "g"
        convert(write_t5(tmp_path / "a", "v1.1"), source, "gqa", kv_heads=2)
    else:
        source = weighted(tmp_path, kind)
    request = GrowthRequest(**{**REQUESTS, **GROUPED}[request_])
    plan, manifest = grow_checkpoint(source, tmp_path / "b", request, threads=1)
    assert plan.exactness.value in ("exact", "bit-exact")
    assert manifest["verification"]["passed"]
    before, after = logits(source), logits(tmp_path / "b")
    assert float((after - before).abs().max()) < 2e-5 * max(1.0, float(before.std()))
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) > sum(
        t.numel() for t in load_file(source / "model.safetensors").values()
    )


@pytest.mark.parametrize("option", ["kv_heads", "heads", "head_dim"])
def test_growth_that_cannot_be_exact_is_refused_by_name(tmp_path: Path, option: str) -> None:
    source = weighted(tmp_path)
    with pytest.raises(UsageError, match="--" + option.replace("_", "-")):
        grow_checkpoint(source, tmp_path / "b", GrowthRequest(**{option: "x2"}), verify=False)
    assert not (tmp_path / "b").exists()


def test_inspect_counts_the_heads_that_are_cached(tmp_path: Path) -> None:
    with open_checkpoint(weighted(tmp_path)) as checkpoint:
        report = inspect_checkpoint(checkpoint)
    assert report["family"] == "t5_wgqa"
    assert report["axes"]["kv_head"]["size"] == 2 and report["axes"]["query_head"]["size"] == HEADS
    assert "--query-heads" in report["can_grow"] and "--kv-heads" not in report["can_grow"]
    # 2 G d elements in each of two caches of three decoder layers, float32
    assert report["cost"]["kv_cache_bytes_per_token"] == 2 * 2 * DIM * 2 * 3 * 4
    assert report["cost"]["parameters"] == sum(
        t.numel() for t in load_file(tmp_path / "weighted" / "model.safetensors").values()
    )


# -- refusals and the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"to": "gqa", "kv_heads": 3}, "--kv-heads 3"),
        ({"to": "wgqa", "kv_heads": 0}, "--kv-heads 0"),
        ({"to": "wgqa", "kv_heads": 2, "wgqa_weights": "rows"}, "--wgqa-weights 'rows'"),
        ({"to": "gda"}, "cannot be converted to gda"),
        ({"to": "plain"}, "ordinary attention already"),
    ],
)
def test_refusals_of_a_t5(tmp_path: Path, request_: dict[str, Any], sentence: str) -> None:
    source = write_t5(tmp_path / "a")
    with pytest.raises(UsageError, match=sentence):
        convert(source, tmp_path / "b", **request_)
    assert not (tmp_path / "b").exists()


def test_refusals_of_a_weighted_t5(tmp_path: Path) -> None:
    source = weighted(tmp_path)
    for to in ("gqa", "wgqa", "mha"):
        with pytest.raises(UsageError, match="merged by learned weights"):
            convert(source, tmp_path / "b", to, kv_heads=2)
    with pytest.raises(UsageError, match="--format 'qwen3'"):
        convert(source, tmp_path / "b", "plain", format="qwen3")
    assert not (tmp_path / "b").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_t5(tmp_path / "a")
    folders = [str(tmp_path / name) for name in ("a", "w", "f")]
    assert source == Path(folders[0])
    options = ["--kv-heads", "2", "--wgqa-weights", "column"]
    assert main(["convert", folders[0], "--to", "wgqa", *options, "--out", folders[1]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not exact" in shown and "perplexity" in shown
    assert main(["export", folders[1], "--fold", "--out", folders[2]]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["verify", folders[1], folders[2]]) == 0
