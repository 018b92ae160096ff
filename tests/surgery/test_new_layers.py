"""Models of 0 and 1 layers, and what new layers begin as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import LAYER_NORM_FAMILIES, family_config, write_checkpoint
from safetensors.torch import load_file
from tiny_checkpoints import diffllama_config, gda_config
from transformers import AutoConfig, AutoModelForCausalLM
from variant_checkpoints import write_variant

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.growing import grow_checkpoint
from growkit.surgery.plan_builder import residual_scale
from growkit.surgery.request import GrowthRequest
from growkit.verification import verify_checkpoints
from growkit.verification.loading import register_own_models

IDS = torch.arange(48).reshape(1, -1) % 256
LAYERS = {"gpt2": "n_layer"}


def start(path: Path, kind: str, layers: int, **changes: Any) -> Path:
    """A model of so many layers, written by transformers."""
    register_own_models()
    torch.manual_seed(0)
    own = {"gda": gda_config, "diffllama": diffllama_config}
    if kind in own:
        config = own[kind](**{"num_hidden_layers": layers, **changes})
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(path)
        return path
    if kind in LAYER_NORM_FAMILIES:
        given = LAYER_NORM_FAMILIES[kind] | {LAYERS.get(kind, "num_hidden_layers"): layers}
        config = AutoConfig.for_model(vocab_size=256, bos_token_id=None, eos_token_id=None, **given)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return path
    return write_checkpoint(path, family_config(kind, num_hidden_layers=layers, **changes))


def grow(source: Path, out: Path, **request: Any) -> Any:
    return grow_checkpoint(source, out, GrowthRequest(**request), verify=False)[0]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return load(path)(IDS).logits


KINDS = ["gda", "olmo2", "qwen3_moe", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_from_no_layers(tmp_path: Path, kind: str) -> None:
    """Identity layers are exact, in the shapes of config.json; random ones are, number for
    number of their spread, what the class makes (but for what writes the residual stream)."""
    source = start(tmp_path / "zero", kind, 0)
    grow(source, tmp_path / "exact", layers="3")
    assert torch.equal(logits(source), logits(tmp_path / "exact"))

    grow(source, tmp_path / "random", layers="3", new_layers="random")
    assert not torch.equal(logits(source), logits(tmp_path / "random"))
    found = load_file(tmp_path / "random" / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "random")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "class")
    theirs = load_file(tmp_path / "class" / "model.safetensors")
    assert found.keys() == theirs.keys()
    by_class = residual_scale(3) if kind != "gpt2" else 1.0  # GPT-2's class scales by itself
    for name, value in theirs.items():
        assert found[name].shape == value.shape, name
        if (".0." not in name and ".1." not in name) or "lambda" in name:
            continue  # lambda vectors have 4 random numbers: see the next test
        ours, own = found[name].float(), value.float()
        writes = any(part in name for part in ("o_proj", "down_proj", "c_proj", "fc2", "out_proj"))
        if kind in ("gemma3", "olmo2"):  # there the gain of a norm writes
            writes = "post_attention_layernorm" in name or "post_feedforward_layernorm" in name
        offset = 1.0 if kind == "gemma3" and "norm" in name else 0.0
        scale = by_class if writes else 1.0
        size = ((ours + offset).square().mean() / max((own + offset).square().mean(), 1e-12)).sqrt()
        if not (own + offset).any():
            assert not (ours + offset).any(), name
        else:
            few = 0.4 if ours.numel() < 64 else 0.15
            spread = few if own.std() > 0 else 1e-6
            assert size.item() == pytest.approx(scale, rel=spread), name


def test_polynorm_and_lambda_from_scratch(tmp_path: Path) -> None:
    """Lambda vectors are float32 of the config's spread, PolyNorm weighs its powers by a third, and
    lambda_init is that of a model from scratch."""
    config = gda_config(num_hidden_layers=0, hidden_act="poly_norm", dtype="bfloat16")
    register_own_models()
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "zero")
    grow(tmp_path / "zero", tmp_path / "grown", layers="4", new_layers="random")
    found = load_file(tmp_path / "grown" / "model.safetensors")
    name = "model.layers.3.self_attn.lambda_q1"
    assert found[name].dtype == torch.float32 and 0.02 < found[name].std() < 0.3
    third = torch.tensor(1 / 3, dtype=torch.bfloat16)
    assert bool((found["model.layers.2.mlp.act_fn.weight"] == third).all())
    assert not found["model.layers.2.mlp.act_fn.bias"].any()
    written = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert written["lambda_init"][:2] == pytest.approx([0.2, 0.35550], abs=1e-4)
    assert torch.isfinite(logits(tmp_path / "grown")).all()


def test_one_layer_to_many(tmp_path: Path) -> None:
    source = start(tmp_path / "one", "gda", 1, lambda_init=[0.2])
    for word in ("identity", "random", "copy", "interposed"):
        plan = grow(source, tmp_path / word, layers="4", new_layers=word)
        assert plan.exactness.value == ("bit-exact" if word == "identity" else "not-exact")
        kept = load_file(tmp_path / word / "model.safetensors")
        for name, value in load_file(source / "model.safetensors").items():
            assert torch.equal(kept[name], value), name
    assert torch.equal(logits(source), logits(tmp_path / "identity"))
    assert same_files(tmp_path / "copy", tmp_path / "interposed")  # of one layer they are the same
    written = json.loads((tmp_path / "random" / "config.json").read_text())["lambda_init"]
    assert written[0] == 0.2 and written[3] > 0.5


def same_files(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_words_and_their_older_names(tmp_path: Path) -> None:
    source = start(tmp_path / "two", "llama", 2)
    for word, older in (("copy", "stack"), ("interposed", "interpolate")):
        plan = grow(source, tmp_path / word, layers="4", new_layers=word)
        grow(source, tmp_path / older, layers="4", depth_method=older)
        assert same_files(tmp_path / word, tmp_path / older)
        order = [layer.source for layer in plan.growth.layers]
        assert order == ([0, 1, 0, 1] if word == "copy" else [0, 0, 1, 1])
    plan = grow(source, tmp_path / "cycle", layers="3", new_layers="copy")
    assert [layer.source for layer in plan.growth.layers] == [0, 1, 0]
    with pytest.raises(UsageError, match="say different things"):
        grow(source, tmp_path / "both", layers="4", new_layers="copy", depth_method="solar")


def test_random_layers_are_reproducible(tmp_path: Path) -> None:
    """The bytes depend on seed and name: not on shards, not on threads."""
    source = start(tmp_path / "one", "llama", 1, hidden_size=64, intermediate_size=600)
    tensors = []
    for number, (threads, shard, seed) in enumerate([(1, "5GB", 0), (4, "60KB", 0), (1, "5GB", 1)]):
        out = tmp_path / str(number)
        request = GrowthRequest(layers="3", new_layers="random", seed=seed)
        grow_checkpoint(source, out, request, verify=False, threads=threads, max_shard_size=shard)
        tensors.append({k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()})
    first, sharded, other = tensors
    name = "model.layers.2.mlp.gate_proj.weight"
    assert all(torch.equal(first[name], sharded[name]) for name in first)
    assert not torch.equal(first[name], other[name])  # negative control: another seed
    assert not torch.equal(first[name], first["model.layers.1.mlp.gate_proj.weight"])


def test_a_jump_is_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = start(tmp_path / "one", "llama", 1)
    out = tmp_path / "grown"
    assert (
        main(["grow", str(source), "--layers", "3", "--new-layers", "copy", "--out", str(out)]) == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "not exact (informational)" in shown and "the loss jumps by" in shown
    report = verify_checkpoints(source, out, tokens=64, window=32)
    assert report.passed is None and report.max_difference > 0


def test_a_start_that_growkit_does_not_know(tmp_path: Path) -> None:
    """SAS starts its simulations by torch's rule: nothing is guessed."""
    source = write_variant(tmp_path / "sas", "sas")
    with pytest.raises(UsageError, match="does not know how"):
        grow(source, tmp_path / "random", layers="3", new_layers="random")
    assert not (tmp_path / "random").exists()


def test_copies_refused_without_layers(tmp_path: Path) -> None:
    source = start(tmp_path / "zero", "llama", 0)
    with pytest.raises(UsageError, match="the checkpoint has none"):
        grow(source, tmp_path / "copy", layers="3", new_layers="copy")
    assert not (tmp_path / "copy").exists()


def test_commands_read_a_model_of_no_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = start(tmp_path / "zero", "gda", 0)
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]["layer"]["size"] == 0
    assert main(["plan", str(source), "--layers", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layer_sources"] == [{"source": None, "kind": "identity"}] * 2
    assert main(["grow", str(source), "--layers", "2", "--out", str(tmp_path / "grown")]) == 0
    capsys.readouterr()
    assert main(["verify", str(source), str(tmp_path / "grown")]) == 0
    assert main(["diff", str(source), str(tmp_path / "grown")]) == 0


# -- aligned ---------------------------------------------------------------------------------------


def shuffled(source: Path, out: Path) -> Path:
    """Layer 1 is layer 0 with its FFN units, key/value heads and query heads in another order."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    ffn = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    kv, query = torch.tensor([1, 0]), torch.tensor([3, 2, 0, 1])
    rows = {"q": query, "k": kv, "v": kv}
    for name in [name for name in tensors if ".layers.0." in name]:
        value, heads = tensors[name], rows.get(name.split(".")[-2][:1])
        if "_proj" in name and "self_attn" in name and heads is not None:
            value = value.unflatten(0, (-1, 8))[heads].flatten(0, 1)
        elif "o_proj" in name:
            value = value.unflatten(1, (-1, 8))[:, query].flatten(1, 2)
        elif "gate_proj" in name or "up_proj" in name:
            value = value[ffn]
        elif "down_proj" in name:
            value = value[:, ffn]
        tensors[name.replace(".0.", ".1.")] = value.clone().contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_aligned_finds_the_order_of_the_neighbour(tmp_path: Path) -> None:
    """The mean of a layer and its reordered twin is the layer; without matching it is not."""
    pytest.importorskip("scipy")
    source = shuffled(start(tmp_path / "two", "llama", 2), tmp_path / "twins")
    plan = grow(source, tmp_path / "out", layers="3", new_layers="aligned")
    assert plan.exactness.value == "not-exact"
    kinds = [layer.kind for layer in plan.growth.layers]
    assert kinds.count("aligned") == 1
    new = kinds.index("aligned")
    donor = plan.growth.layers[new].source
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        old = before[f"model.layers.{donor}.{part}.weight"]
        made = after[f"model.layers.{new}.{part}.weight"]
        assert torch.allclose(made, old, atol=1e-6), part
        plain = (
            before[f"model.layers.0.{part}.weight"] + before[f"model.layers.1.{part}.weight"]
        ) / 2
        assert not torch.allclose(plain, old, atol=1e-3), part  # negative control: no matching
    assert main(["diff", str(source), str(tmp_path / "out")]) == 0
    with pytest.raises(UsageError, match="no other growth"):
        grow(source, tmp_path / "both", layers="3", ffn="x2", new_layers="aligned")
