"""A Motif folder's tensors load by name, unchanged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from growkit.modeling import GdaConfig, GdaForCausalLM

E, F, V, L, D = 32, 64, 61, 2, 8
COMMON = {
    "model_type": "Motif",
    "architectures": ["MotifForCausalLM"],
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "hidden_act": "poly_norm",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
# Motif-2-12.7B in small (4:1), and Motif-2.6B in small (DIFF V1, no num_noise_heads, no head_dim)
SECOND = COMMON | {
    "num_attention_heads": 10,
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": D,
    "tie_word_embeddings": False,
}
FIRST = COMMON | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}


def motif_tensors(heads: int, signal: int, kv: int, tied: bool) -> dict[str, torch.Tensor]:
    """Names and shapes of Motif's modelling file, filled with numbers."""
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not tied:
        shapes["lm_head.weight"] = (V, E)
    for layer in range(L):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes |= {
            prefix + "input_layernorm.weight": (E,),
            prefix + "post_attention_layernorm.weight": (E,),
            attention + "q_proj.weight": (heads * D, E),
            attention + "k_proj.weight": (kv * D, E),
            attention + "v_proj.weight": (kv * D, E),
            attention + "o_proj.weight": (E, 2 * signal * D),
            attention + "lambda_q1": (D,),
            attention + "lambda_k1": (D,),
            attention + "lambda_q2": (D,),
            attention + "lambda_k2": (D,),
            attention + "subln.weight": (2 * D,),
            prefix + "mlp.gate_proj.weight": (F, E),
            prefix + "mlp.up_proj.weight": (F, E),
            prefix + "mlp.down_proj.weight": (E, F),
            prefix + "mlp.act_fn.weight": (3,),
            prefix + "mlp.act_fn.bias": (1,),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("motif", "sizes"),
    [(SECOND, (10, 8, 4, False)), (FIRST, (4, 2, 4, True))],
    ids=["motif-2", "motif-2.6b"],
)
def test_every_tensor_has_its_place(motif, sizes, tmp_path):
    tensors = motif_tensors(*sizes)
    config = GdaConfig.from_motif(motif)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(motif))
    model, report = GdaForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()

    model.save_pretrained(tmp_path / "ours")
    again = GdaForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_state_dict_loads_strictly_and_a_strange_name_is_refused():
    model = GdaForCausalLM(GdaConfig.from_motif(SECOND))
    tensors = motif_tensors(10, 8, 4, False)
    model.load_state_dict(tensors, strict=True)
    tensors["model.layers.0.self_attn.sub_norm.weight"] = torch.ones(2 * D)
    with pytest.raises(RuntimeError, match="sub_norm"):
        model.load_state_dict(tensors, strict=True)
