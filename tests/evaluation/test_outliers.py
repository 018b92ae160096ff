"""Largest values, median and kurtosis against plain sorting; logits against the model's maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import diffllama_config, gda_config, llama_config, make_folder
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growkit.evaluation.attention_maps import eager
from growkit.evaluation.model import LoadedModel
from growkit.evaluation.outliers import (
    ActivationOutliers,
    LargestValues,
    attention_logits,
    measure_outliers,
)
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

IDS = torch.arange(3 * 10).view(3, 10)
CONFIGS = {"llama": llama_config(), "gda": gda_config(), "diffllama": diffllama_config()}


@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=90), min_size=1, max_size=4
    )
)
def test_largest_values_are_those_of_sorting(parts: list[list[float]]) -> None:
    values = LargestValues()
    for part in parts:
        values.add(torch.tensor(part))
    found = values.result()
    ordered = torch.tensor([x for part in parts for x in part]).abs().sort(descending=True).values
    assert found.values == len(ordered)
    for rank in (1, 2, 3, 10, 100):
        expected = ordered[rank - 1].item() if rank <= len(ordered) else None
        assert getattr(found, f"top_{rank}") == expected
    lower = ordered.flip(0)[(len(ordered) - 1) // 2].item()
    assert found.median == pytest.approx(lower, rel=3e-4, abs=1e-38)


def in_memory(path: Path, name: str) -> LoadedModel:
    if not path.exists():
        make_folder(path, CONFIGS[name])
    model = load_model(open_folder(path), torch.float32)
    return LoadedModel(path, model, None, torch.device("cpu"), "float32")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_what_the_softmax_gets(tmp_path: Path, name: str) -> None:
    """The softmax of the logits is the model's own map, and each is counted once."""
    model = in_memory(tmp_path / name, name).model
    seen: list[torch.Tensor] = []
    with eager(model), attention_logits(seen.append):
        maps = model(input_ids=IDS[:1], output_attentions=True, use_cache=False).attentions
    heads = sum(part.shape[1] for part in maps)
    assert sum(len(part) for part in seen) == heads * 10 * 11 // 2
    rows = torch.cat([part.view(-1, 55) for part in seen])  # one map a row
    lower = torch.tril(torch.ones(10, 10, dtype=torch.bool))
    full = torch.full((heads, 10, 10), float("-inf"))
    full[:, lower] = rows
    found = full.softmax(-1).flatten(1).sort(0).values
    expected = torch.cat([part[0] for part in maps]).flatten(1).sort(0).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_library_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = in_memory(tmp_path / "llama", "llama")
    with pytest.raises(RuntimeError), attention_logits(lambda logits: None):
        raise RuntimeError
    measure_outliers(loaded, IDS)
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert loaded.model.config._attn_implementation == "sdpa"


def test_capped_logits_are_seen_capped() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        attn_logit_softcapping=0.05,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 1000
    found = measure_outliers(
        LoadedModel(Path("x"), model, None, torch.device("cpu"), "float32"), IDS
    )
    assert found.attention_logits is not None
    assert found.attention_logits.top_1 == pytest.approx(0.05)


def test_hidden_states_are_the_outputs_of_the_layers(tmp_path: Path) -> None:
    loaded = in_memory(tmp_path / "llama", "llama")
    found = measure_outliers(loaded, IDS)
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: outputs.append(out if torch.is_tensor(out) else out[0])
        )
        for layer in loaded.model.model.layers
    ]
    loaded.model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    every = torch.cat([output.flatten() for output in outputs]).abs().sort(descending=True).values
    assert found.hidden_states.values == len(every) == 2 * 30 * 16
    assert found.hidden_states.top_1 == pytest.approx(every[0].item(), rel=1e-5)
    assert found.hidden_states.top_100 == pytest.approx(every[99].item(), rel=1e-5)
    for layer, output in enumerate(outputs):
        x = output.double().flatten()
        x = x - x.mean()
        expected = ((x**4).mean() / (x**2).mean() ** 2).item()
        assert found.hidden_kurtosis[layer] == pytest.approx(expected, rel=1e-6)
        assert found.largest_hidden_state[layer] == pytest.approx(output.abs().max().item())


def test_a_planted_outlier_is_found(tmp_path: Path) -> None:
    loaded = in_memory(tmp_path / "llama", "llama")
    before: ActivationOutliers = measure_outliers(loaded, IDS)
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[3] += 500
    after = measure_outliers(loaded, IDS)
    assert after.largest_hidden_state[0] == before.largest_hidden_state[0]
    assert after.hidden_states.top_1 > 10 * before.hidden_states.top_1
    assert after.hidden_kurtosis[1] > 3 * before.hidden_kurtosis[1]
    assert after.attention_logits == before.attention_logits
