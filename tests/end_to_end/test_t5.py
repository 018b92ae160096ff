"""T5: written by transformers, grown in both stacks, loaded by transformers, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import T5_KINDS, write_t5
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from growkit.cli.main import main
from growkit.core.errors import CheckpointError, UsageError
from growkit.growing import grow_checkpoint
from growkit.record.manifest import read_manifest
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import verify_checkpoints

Tensors = dict[str, torch.Tensor]
REQUESTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": "x2"},
    "new heads": {"heads": "+1", "new_heads": "zero"},
    "ffn": {"ffn": "x1.5"},
    "new units": {"ffn": "+5", "new_units": "zero"},
    "hidden x2": {"hidden": "x2"},
    "hidden x4": {"hidden": "x4"},
    "hidden padded": {"hidden": "+7"},
    "encoder": {"layers": "+2"},
    "decoder": {"decoder_layers": "5", "layer_placement": "0,2"},
    "together": {"heads": "x2", "ffn": "x2", "hidden": "x2", "layers": "x2", "decoder_layers": "4"},
}
BIT_EXACT = {"new heads", "new units", "encoder", "decoder"}


def grow(source: Path, out: Path, verify: bool = True, **request: Any) -> tuple[Plan, Any]:
    return grow_checkpoint(source, out, GrowthRequest(**request), verify=verify, threads=1)


def run(folder: Path) -> tuple[Any, torch.Tensor]:
    """Model and logits on a source and a target text; nothing may be missing."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(96).reshape(2, 48) * 7 % 256
    decoder_ids = torch.arange(60).reshape(2, 30) * 11 % 256
    with torch.no_grad():
        return model, model.eval()(input_ids=ids, decoder_input_ids=decoder_ids).logits


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kind", T5_KINDS)
def test_growth_keeps_the_function(tmp_path: Path, kind: str, name: str) -> None:
    source = write_t5(tmp_path / "a", kind)
    plan, manifest = grow(source, tmp_path / "b", **REQUESTS[name])
    figures = manifest["verification"]
    assert figures["passed"] and figures["generation"]["explained"]
    assert figures["layers_b"] == plan.sizes["layer"] + plan.sizes["decoder_layer"]
    (model, grown), (_, old) = run(tmp_path / "b"), run(source)
    if name in BIT_EXACT:
        assert plan.exactness.value == "bit-exact"
        assert torch.equal(grown, old)
    else:
        # sqrt(2) rounds in the final gain, where it is a factor.
        rounds = "hidden" in REQUESTS[name] and REQUESTS[name]["hidden"] == "x2"
        rounds = rounds and T5_KINDS[kind][0].get("tie_word_embeddings") is not False
        assert plan.exactness.value == ("rounded" if rounds else "exact")
        assert float((grown - old).abs().max()) < 2e-5 * max(1.0, float(old.std()))
    assert model.config.num_heads == plan.sizes["query_head"]
    tied = model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert tied != T5_KINDS[kind][1]


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_bfloat16(tmp_path: Path, kind: str) -> None:
    source = write_t5(tmp_path / "a", kind, torch.bfloat16)
    plan, manifest = grow(source, tmp_path / "b", hidden="x4", heads="x2", decoder_layers="+1")
    assert plan.exactness.value == "exact"
    assert manifest["verification"]["passed"]
    assert manifest["verification"]["max_difference"] < 1e-4


@pytest.mark.parametrize("method", ["stack", "interpolate", "solar"])
def test_repeated_layers_of_both_stacks(tmp_path: Path, method: str) -> None:
    """Another function: that of modules stacked in torch; block 0 keeps the position bias."""
    source = write_t5(tmp_path / "a", num_layers=4, num_decoder_layers=4)
    target = {"stack": "8", "interpolate": "7", "solar": "6"}[method]
    plan, _ = grow(
        source, tmp_path / "b", layers=target, decoder_layers=target, depth_method=method
    )
    assert plan.exactness.value == "not-exact"
    (old, _), (new, grown) = run(source), run(tmp_path / "b")
    built = AutoModelForSeq2SeqLM.from_config(new.config).eval()
    built.shared.load_state_dict(old.shared.state_dict())
    for stack, axis in (("encoder", "layer"), ("decoder", "decoder_layer")):
        left, right = getattr(built, stack), getattr(old, stack)
        left.final_layer_norm.load_state_dict(right.final_layer_norm.state_dict())
        for block, layer in zip(left.block, plan.growth.stacks[axis], strict=True):
            values = right.block[layer.source].state_dict()
            bias = "layer.0.SelfAttention.relative_attention_bias.weight"
            if block is not left.block[0]:
                values.pop(bias, None)
            block.load_state_dict(values)
    built.tie_weights()
    ids = torch.arange(96).reshape(2, 48) * 7 % 256
    decoder_ids = torch.arange(60).reshape(2, 30) * 11 % 256
    with torch.no_grad():
        assert torch.equal(grown, built(input_ids=ids, decoder_input_ids=decoder_ids).logits)


# -- negative controls ----------------------------------------------------------------------------


def position_bias_of_other_heads(tensors: Tensors) -> None:
    """Columns tiled where heads are copied beside themselves."""
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[name] = tensors[name][:, [0, 2, 4, 6, 1, 3, 5, 7]].contiguous()


def encoder_position_bias_lost(tensors: Tensors) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].zero_()


def head_divisor_forgotten(tensors: Tensors) -> None:
    tensors["decoder.final_layer_norm.weight"] *= 2**-0.5


def speaking_cross_attention(tensors: Tensors) -> None:
    name = "decoder.block.{}.layer.1.EncDecAttention.o.weight"
    assert not tensors[name.format(1)].any()
    tensors[name.format(1)] = tensors[name.format(0)].clone()


def cross_keys_exchanged(tensors: Tensors) -> None:
    name = "decoder.block.0.layer.1.EncDecAttention.{}.weight"
    keys, values = name.format("k"), name.format("v")
    tensors[keys], tensors[values] = tensors[values], tensors[keys]


DEEPER = {"decoder_layers": "+1", "layer_placement": "0"}
BROKEN: dict[str, tuple[dict[str, Any], Callable[[Tensors], None], str]] = {
    "bias columns": ({"heads": "x2"}, position_bias_of_other_heads, "decoder layer 0"),
    "encoder bias": ({"ffn": "x2"}, encoder_position_bias_lost, "encoder layer 0"),
    "final gain": ({"hidden": "x2"}, head_divisor_forgotten, "up to decoder layer 2"),
    "cross-attention": (DEEPER, speaking_cross_attention, "decoder layer 1"),
    "cross keys": ({"ffn": "x2"}, cross_keys_exchanged, "decoder layer 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_growth_fails_and_names_the_stack(tmp_path: Path, name: str) -> None:
    request, change, place = BROKEN[name]
    source = write_t5(tmp_path / "a")
    grow(source, tmp_path / "b", False, **request)
    file = tmp_path / "b" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    report = verify_checkpoints(source, tmp_path / "b", tokens=64, window=32, generate_tokens=2)
    assert not report.passed
    assert report.max_difference > 100 * report.tolerance
    assert place in report.cause


# -- folder, plan, commands -----------------------------------------------------------------------


def test_config_keeps_what_growth_did_not_change(tmp_path: Path) -> None:
    source = write_t5(tmp_path / "a")
    grow(source, tmp_path / "b", heads="x2", layers="+1")
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ab")
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"num_heads", "num_layers", "growkit"}


def test_a_decoder_depth_that_the_config_left_out_is_stated(tmp_path: Path) -> None:
    """The class takes it from the encoder, which has become deeper."""
    source = write_t5(tmp_path / "a", num_decoder_layers=2)
    config = json.loads((source / "config.json").read_text())
    del config["num_decoder_layers"]
    (source / "config.json").write_text(json.dumps(config))
    grow(source, tmp_path / "b", layers="+2")
    after = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (after["num_layers"], after["num_decoder_layers"]) == (4, 2)


def test_stored_copies_of_the_embedding(tmp_path: Path) -> None:
    source = write_t5(tmp_path / "a")
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.embed_tokens.weight"
    save_file(tensors | {name: tensors["shared.weight"].clone()}, file, {"format": "pt"})
    plan, manifest = grow(source, tmp_path / "b", hidden="x2")
    assert manifest["verification"]["passed"]
    assert any(name in warning for warning in plan.warnings)
    assert name not in load_file(tmp_path / "b" / "model.safetensors")
    save_file(tensors | {name: tensors["shared.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is stored and differs"):
        grow(source, tmp_path / "c", hidden="x2")


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"query_heads": "x2"}, "one key/value head for each query head.*--heads"),
        ({"untie_embeddings": True}, "ties t5 embeddings again"),
        ({"signal_heads": "x2"}, "--decoder-layers"),
    ],
)
def test_what_t5_cannot_grow(tmp_path: Path, request_: dict[str, Any], match: str) -> None:
    source = write_t5(tmp_path / "a")
    with pytest.raises(UsageError, match=match) as refused:
        grow(source, tmp_path / "b", **request_)
    assert refused.value.remedy
    assert not (tmp_path / "b").exists()


def test_decoder_layers_of_a_decoder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from family_checkpoints import family_config, write_checkpoint

    source = write_checkpoint(tmp_path / "a", family_config("llama"))
    assert main(["plan", str(source), "--decoder-layers", "x2"]) == 2
    assert "no decoder layers" in " ".join(capsys.readouterr().err.split())


def test_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    source, out = write_t5(tmp_path / "a"), tmp_path / "b"
    assert main(["inspect", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"--layers", "--decoder-layers", "--ffn", "--hidden"} <= set(report["can_grow"])
    assert report["axes"]["layer"] == {"label": "encoder layers", "size": 2}
    model, _ = run(source)
    assert report["cost"]["parameters"] == model.num_parameters()

    args = ["grow", str(source), "--decoder-layers", "+2", "--heads", "x2", "--out", str(out)]
    assert main(args) == 0
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert "decoder layers 3 -> 5" in text and "growkit train" not in text
    assert "past_key_values=EncoderDecoderCache" in text

    manifest = read_manifest(out) or {}
    kinds = [layer["kind"] for layer in manifest["plan"]["decoder_layer_sources"]]
    assert kinds.count("identity") == manifest["plan"]["inserted_layers"] == 2
    new = manifest["new_parameters"]
    inserted = kinds.index("identity")
    assert new[f"decoder.block.{inserted}.layer.1.EncDecAttention.k.weight"] == "all"
    assert new["encoder.block.0.layer.0.SelfAttention.q.weight"]["rows"]
    assert new["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]["columns"]

    assert main(["diff", str(source), str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["as_grown"] is True
    assert main(["diff", str(source), str(out)]) == 0
    assert "decoder layer.1.EncDecAttention.o" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(source), str(out), "--layerwise", "on"]) == 2
    assert "encoder-decoder" in capsys.readouterr().err


def test_training_says_that_it_is_for_decoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_t5(tmp_path / "a")
    args = ["--set", f"model.checkpoint={source}", "--set", "tokenizer.bytes=true"]
    assert main(["train", "train-continue", *args, "--out", str(tmp_path / "run")]) == 2
    assert "encoder-decoder" in capsys.readouterr().err
