"""Families known from their classes: the maps of their weights take the moments along too.

The source's gradients are put in the place of its moments and grown; the grown model's own
gradients have to be the result. The classes compute norms in float32, so up to 1e-4; a wrong factor
is off by half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from state_runs import OPTIONS, Run, load, steps
from test_state_gradients import deviation, mapped, old_slots, plans
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.families.derived.family import derived_family
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import tables_of

COMMON = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {**COMMON, "model_type": "phi", "head_dim": 4}
FUSED_EXPERTS = {
    **COMMON,
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}
GROWTHS = [
    {"ffn": "x2", "query_heads": "x2"},
    {"heads": "x2", "layers": "+2", "layer_placement": "end"},
    {"hidden": "x2"},
]


def run_of(config: dict[str, Any], folder: Path) -> Run:
    """A model of a class of transformers, trained for two steps and saved as Trainer does."""
    torch.manual_seed(0)
    given = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **given)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    model = load(folder)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}], **OPTIONS)
    for _ in steps(model, optimizer, 0, 2):
        pass
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return Run(folder, model, optimizer)


@pytest.mark.parametrize("config", [DENSE, FUSED_EXPERTS], ids=lambda c: c["model_type"])
def test_gradients_of_a_derived_family_grow_as_its_weights(
    config: dict[str, Any], tmp_path: Path
) -> None:
    source = run_of(config, tmp_path / "run")
    stated = json.loads((source.folder / "config.json").read_text())
    family = derived_family(stated)
    if family is None:
        kinds = [misfit(table, stated) for table in tables_of(config["model_type"])]
        pytest.skip(f"no table of it ships (they are for another {', '.join(kinds)})")
    for number, growth in enumerate(GROWTHS):
        if any("--" + name.replace("_", "-") in family.refused for name in growth):
            continue
        folder = tmp_path / f"growth-{number}"
        folder.mkdir()
        state, new, _ = mapped(source, folder, symmetry="even", **growth)
        tensors = plans(source, symmetry="even", **growth)
        moved = 0
        for name, moments in state.items():
            known = old_slots(tensors[name])
            true = new[name] * known
            if true.abs().max() < 1e-9:  # what the loss does not depend on
                continue
            assert deviation(moments["exp_avg"], true) < 1e-4, (growth, name)
            assert deviation(moments["exp_avg_sq"], true**2) < 1e-4, (growth, name)
            moved += any(dim is not None for dim in tensors[name].dims)
        assert moved > 5
