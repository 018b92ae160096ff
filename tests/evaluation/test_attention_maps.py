"""Maps are the model's own, and the effective map is what its values really meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_checkpoints import diffllama_config, gda_config, llama_config, make_folder
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    MambaConfig,
    MptConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from variant_checkpoints import VARIANTS, write_variant

from growkit.core.errors import CheckpointError, UsageError
from growkit.evaluation.attention_maps import LayerMaps, observe
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

IDS = torch.arange(3, 3 + 2 * 9).view(2, 9)
GDA = {
    "gda": gda_config(sub_layer_norm=False),
    "gda-1:3": gda_config(signal=2, noise=6, sub_layer_norm=False),
    "gda-shared": gda_config(own=False, sub_layer_norm=False),
    "diffllama": diffllama_config(heads=8),
    "llama": llama_config(),
}
# Differences of maps without a norm after them: the output is the effective maps' alone.
PLAIN = {
    "diff_v2": {"attention_output_bias": False},
    "gda_gated": {"attention_output_bias": False},
    "diff_v1-plain": {},
    "shared_diff-q": {},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    path = tmp_path_factory.mktemp("models")

    def build(name: str, **changes: Any) -> Any:
        folder = path / f"{name}{len(changes)}".replace(":", "-")
        if not folder.exists() and name in GDA:
            make_folder(folder, GDA[name])
        elif not folder.exists():
            write_variant(folder, name, **changes)
        return load_model(open_folder(folder), torch.float64)

    return build


def observed(model: Any) -> list[LayerMaps]:
    layers: list[LayerMaps] = []
    observe(model, lambda layer, maps: layers.append(maps), input_ids=IDS)
    return layers


def attention_outputs(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Input and output of every attention module."""
    inputs, outputs, hooks = [], [], []
    for layer in model.model.layers:

        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            outputs.append(output[0])

        hooks.append(layer.self_attn.register_forward_hook(keep, with_kwargs=True))
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs, outputs


def from_effective(name: str, module: Any, x: Tensor, maps: Tensor) -> Tensor:
    """The layer's output, from its effective maps [b, heads, n, n] and its values alone."""
    d, heads = module.head_dim, maps.shape[1]
    values = module.v_proj(x).unflatten(-1, (-1, d)).transpose(1, 2)  # [b, kv heads, n, d]
    if name == "diffllama":  # value i of one half and value i of the other are one of width 2d
        values = torch.cat(values.chunk(2, dim=1), dim=-1)
    elif getattr(getattr(module, "heads", None), "noise_keys", "shared") == "own":
        values = values.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
    values = values.repeat_interleave(heads // values.shape[1], dim=1)
    output = maps @ values
    if name == "diffllama":
        output = (1 - module.lambda_init) * module.groupnorm(output)
    return module.o_proj(output.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", [*GDA, *PLAIN])
def test_effective_maps_times_values_are_the_layers_output(make, name: str) -> None:
    model = make(name, **PLAIN.get(name, {}))
    layers = observed(model)
    inputs, outputs = attention_outputs(model)
    assert len(layers) == len(outputs) == len(model.model.layers)
    for found, x, expected in zip(layers, inputs, outputs, strict=True):
        maps = found.groups()["effective"]
        torch.testing.assert_close(
            from_effective(name, found.module, x, maps), expected, rtol=1e-4, atol=1e-6
        )
        if name != "llama":  # negative control: the signal maps alone are not what is computed
            wrong = from_effective(name, found.module, x, found.groups()["signal"])
            assert (wrong - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*GDA, *VARIANTS])
def test_groups_of_every_variant(make, name: str) -> None:
    layers = observed(make(name))
    for found in layers:
        groups = found.groups()
        torch.testing.assert_close(found.maps.sum(-1), torch.ones_like(found.maps.sum(-1)))
        differential = name.startswith(("gda", "diff", "shared"))
        assert set(groups) == ({"effective", "signal", "noise"} if differential else {"effective"})
        if differential:
            assert groups["signal"].shape == groups["effective"].shape
            parts = groups["signal"].shape[1] + groups["noise"].shape[1]
            assert parts == found.maps.shape[1]
        last = found.last_rows().groups()
        for kind, maps in groups.items():
            assert torch.equal(last[kind], maps[:, :, -1:])
        assert found.visible[0].tolist() == list(range(1, 10))


def test_the_model_is_left_as_it_was(make) -> None:
    model = make("gda")
    before = model(input_ids=IDS).logits
    model.train()
    state = torch.get_rng_state()
    observed(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.eval()(input_ids=IDS).logits, before)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_sliding_window_limits_what_is_visible() -> None:
    config = Gemma2Config(
        **SMALL, num_key_value_heads=1, head_dim=8, intermediate_size=16, sliding_window=4
    )
    sliding, full = observed(AutoModelForCausalLM.from_config(config))
    assert sliding.visible[0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert full.visible[0].tolist() == list(range(1, 10))
    assert ((sliding.maps[0, 0] > 0).sum(-1) == sliding.visible[0]).all()


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**SMALL, intermediate_size=16),
        MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2),  # True where not visible
    ],
    ids=["gpt_neox", "mpt"],
)
def test_other_architectures_show_their_maps(config: Any) -> None:
    layers = observed(AutoModelForCausalLM.from_config(config))
    assert [found.maps.shape for found in layers] == [(2, 2, 9, 9)] * 2
    assert layers[1].visible[0].tolist() == list(range(1, 10))


def test_what_has_no_maps_is_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(CheckpointError, match="MambaForCausalLM returns no attention maps"):
        observed(mamba)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UsageError, match="'t5' is an encoder-decoder"):
        observed(t5)
