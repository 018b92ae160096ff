"""Tables of the LayerNorm families against the classes that they describe."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import (
    FAMILIES,
    LAYER_NORM_FAMILIES,
    class_config,
    family_config,
    layer_norm_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.core.errors import CheckpointError, UsageError
from growkit.families import family_of
from growkit.families.head_dim_rules import PartialRotary

BIAS_SWITCHES = {"gpt_neox": "attention_bias", "opt": "enable_bias"}
CASES = [
    pytest.param(family, tied, bias, id=f"{family}-{'tied' if tied else 'untied'}-{bias}")
    for family in LAYER_NORM_FAMILIES
    for tied in (True, False)
    for bias in ((True, False) if family in BIAS_SWITCHES else (True,))
]


def class_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the class stores, without allocating it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(class_config(config))
    names = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    stored = {n: s for n, s in names.items() if n not in model.all_tied_weights_keys}
    if config["model_type"] == "gpt_neox":  # the module's name is another one than the file's
        return {n.replace("lm_head", "embed_out"): s for n, s in stored.items()}
    return stored


@pytest.mark.parametrize(("family", "tied", "bias"), CASES)
def test_every_parameter_is_declared_once(family: str, tied: bool, bias: bool) -> None:
    switch = {BIAS_SWITCHES[family]: bias} if family in BIAS_SWITCHES else {}
    config = layer_norm_config(family, tie_word_embeddings=tied, **switch)
    table = family_of(config)
    sizes = table.sizes(config)
    declared = [(name, tensor.shape(sizes)) for tensor, _, name in table.names(sizes)]
    assert not [name for name, count in Counter(n for n, _ in declared).items() if count > 1]
    assert dict(declared) == class_shapes(config)
    for tensor in table.tensors:
        if not tensor.when(sizes):
            continue
        lacking = replace(table, tensors=tuple(t for t in table.tensors if t is not tensor))
        with pytest.raises(CheckpointError, match=re.escape(tensor.name.replace("{layer}", "0"))):
            lacking.check_tensors(dict(declared), sizes)


@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_silent_fields_mean_what_the_class_means(family: str) -> None:
    config = {"model_type": family}
    table = family_of(config)
    sizes = table.sizes(config)
    shapes = {name: tensor.shape(sizes) for tensor, _, name in table.names(sizes)}
    assert shapes == class_shapes(config)


@pytest.mark.parametrize("family", [*FAMILIES, *LAYER_NORM_FAMILIES])
def test_epsilon_that_the_class_assumes(family: str) -> None:
    ordinary = family in FAMILIES
    config = family_config(family) if ordinary else layer_norm_config(family)
    norm, real = family_of(config).norm, class_config(config)
    if norm.eps_field is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(real)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert norms and {module.eps for module in norms} == {norm.eps}
    else:
        assert getattr(real, norm.eps_field) == norm.eps


@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_a_hidden_size_that_heads_do_not_fill_is_refused(family: str) -> None:
    config = layer_norm_config(family)
    table = family_of(config)
    sizes = table.sizes(config)
    assert table.refusal(config, sizes) is None
    assert "make 32, not 48" in str(table.refusal(config, {**sizes, "hidden": 48}))
    assert "one key/value head" in str(table.refusal(config, {**sizes, "kv_head": 2}))


@pytest.mark.parametrize(
    ("family", "changes", "cause"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 with hidden_size 32"),
        ("opt", {"_remove_final_layer_norm": True}, "without final norm"),
        ("opt", {"layer_norm_elementwise_affine": False}, "without gains"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    family: str, changes: dict[str, Any], cause: str
) -> None:
    config = layer_norm_config(family, **changes)
    with pytest.raises(UsageError, match=re.escape(cause)):
        family_of(config).sizes(config)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_names_with_and_without_prefix(tmp_path: Path, family: str) -> None:
    config = layer_norm_config(family, tie_word_embeddings=True)
    shapes = class_shapes(config)
    table = family_of(config)
    assert family_of(config, shapes) is table
    bare = {name.removeprefix(table.prefix): shape for name, shape in shapes.items()}
    family_of(config, bare).check_tensors(bare, table.sizes(config))
    with pytest.raises(CheckpointError, match="missing"):
        table.check_tensors(bare, table.sizes(config))


def test_masks_of_old_files_are_ignored() -> None:
    for family, names in (
        ("gpt2", ("h.0.attn.bias", "h.0.attn.masked_bias")),
        ("gpt_neox", ("gpt_neox.layers.0.attention.bias",)),
        ("gpt_neox", ("gpt_neox.layers.1.attention.rotary_emb.inv_freq",)),
    ):
        config = layer_norm_config(family, tie_word_embeddings=True)
        table = family_of(config, names)
        sizes = table.sizes(config)
        shapes = {name: tensor.shape(sizes) for tensor, _, name in table.names(sizes)}
        table.check_tensors(shapes | dict.fromkeys(names, (1, 1, 128, 128)), sizes)


# -- partial rotary encoding ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [*range(8, 40), 96, 100, 128, 129])
@pytest.mark.parametrize("rotated", [2, 4, 6, 8])
def test_the_rotated_channels_stay(dim: int, rotated: int) -> None:
    """int(head_dim x factor), as the class computes it, gives the old number exactly."""
    rule = PartialRotary("rotary_pct", 0.25)
    config = {"rotary_pct": rotated / 8}
    assert rule.rotated(config, 8) == rotated
    written = json.loads(json.dumps(rule.rewritten(config, dim, rotated)))
    assert int(dim * written["rotary_pct"]) == rotated


@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
@pytest.mark.parametrize("place", ["field", "rope_parameters", "silent"])
def test_where_the_factor_stands(tmp_path: Path, family: str, place: str) -> None:
    """What the class makes of the rewritten config, wherever the factor stood."""
    neox = family == "gpt_neox"
    field, default = ("rotary_pct", 0.25) if neox else ("partial_rotary_factor", 1.0)
    stated: dict[str, Any] = {
        "field": {field: 0.5},
        "rope_parameters": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        "silent": {},
    }[place]
    rule = family_of({"model_type": family}).head_dim.rotary
    assert rule is not None
    old = 16 * (default if place == "silent" else 0.5)
    assert rule.rotated(stated, 16) == old
    config = stated | rule.rewritten(stated, 24, int(old))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    real = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert int(24 * real["partial_rotary_factor"]) == old


def test_published_gpt2_file_layout(tmp_path: Path) -> None:
    """Names without prefix and stored masks, as openai-community/gpt2 has them, still load."""
    source = write_checkpoint(tmp_path, layer_norm_config("gpt2", tie_word_embeddings=True))
    file = source / "model.safetensors"
    bare = {k.removeprefix("transformer."): t.clone() for k, t in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 128, 128).tril()}, file, {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"]
