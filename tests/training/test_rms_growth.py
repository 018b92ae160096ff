"""``--symmetry rms``: activations keep their root mean square, and copies part by the optimizer."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import family_config, write_checkpoint
from safetensors.torch import load_file, save_file
from stage_runs import staged_values
from training_runs import recipe_values
from transformers import AutoModelForCausalLM

from growkit.core.errors import UsageError
from growkit.optimizer_state.find import find_state
from growkit.training import optimizer, train
from growkit.training.read_recipe import make_recipe

GROWTHS = {"hidden": "x2", "ffn": "x2", "heads": "x2"}
IDS = torch.arange(40).reshape(1, -1)
RATE = 1e-2


@torch.no_grad()
def sizes(folder: Path) -> dict[str, float]:
    """Root mean square of what every module puts out."""
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                found[name] = value.double().square().mean().sqrt().item()

        return hook

    for name, module in model.named_modules():
        if name and "rotary" not in name:
            module.register_forward_hook(keep(name))
    model(IDS)
    return found


def test_every_activation_keeps_its_root_mean_square(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    plan = tiny.grow(source, tmp_path / "b", symmetry="rms", **GROWTHS)
    assert plan.exactness.value == "exact"
    before, after = sizes(source), sizes(tmp_path / "b")
    assert before.keys() == after.keys() and len(before) > 20
    assert after == pytest.approx(before, rel=1e-5)

    # Negative control: shares of 1 / sqrt(2) where one reader's copies add up in phase.
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2**0.5
    save_file(tensors, file, metadata={"format": "pt"})
    broken = sizes(tmp_path / "b")
    assert broken["model.layers.0.mlp"] == pytest.approx(before["model.layers.0.mlp"] * 2**0.5)

    with pytest.raises(UsageError, match="changes the root mean square"):
        tiny.grow(source, tmp_path / "c", symmetry="rms", hidden="24")


Rates = dict[str, list[float]]


def staged(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, grow: dict[str, Any], **after: Any
) -> Rates:
    """Rates that the library's optimizer was given for old and new slots at each step after a
    growth at step 3 of 8."""
    rates: Rates = defaultdict(list)
    mixed = optimizer._at

    def told(group: Any, parameters: Any, factor: float) -> Any:
        made = mixed(group, parameters, factor)
        if group["part"] == "mixed" and group["kind"] == "adamw":
            rates[f"{group['weight_decay']:g}"].append(made["lr"])
        return made

    monkeypatch.setattr(optimizer, "_at", told)
    stages = [{"at": {"steps": 3}, "grow": grow, "training": after}]
    values = staged_values(text, stages, max_steps=8, learning_rate=RATE)
    values["training"] |= {"warmup_steps": 0, "eval_steps": 8, "save_steps": 8}
    train(make_recipe(values), out)
    monkeypatch.undo()
    return rates


def copies_apart(folder: Path) -> float:
    """How far the copies of the FFN units have moved from each other."""
    tensors = load_file(folder / "model.safetensors")
    apart = [
        (half[0] - half[1]).abs().max().item()
        for name, value in tensors.items()
        if "mlp.up_proj" in name
        for half in [value.chunk(2)]
    ]
    return max(apart)


def test_new_slots_alone_warm_up_and_copies_part(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = {"ffn": "x2", "symmetry": "rms"}
    rates = staged(text_file, tmp_path / "run", monkeypatch, grow, new_warmup_steps=3)
    (applied,) = rates.values()
    # A mixed parameter takes both rates at a step, the new one first, until they are the same.
    matrices, steps = 6, 3
    both = applied[: 2 * matrices * steps]
    assert both[::2] == pytest.approx([RATE * n / 4 for n in (1, 2, 3) for _ in range(matrices)])
    assert set(both[1::2]) == {RATE} and set(applied[len(both) :]) == {RATE}
    assert copies_apart(tmp_path / "run") > 1e-4

    state = find_state(tmp_path / "run" / "training" / "stages" / "1-grown")
    assert state is not None
    moments = state.parameters["model.layers.0.mlp.up_proj.weight"].moments
    for moment in moments.values():
        first, second = torch.from_numpy(moment.read().copy()).chunk(2)
        assert first.abs().max() > 0 and not second.any()


def test_without_the_optimizers_help_copies_stay_equal(text_file: Path, tmp_path: Path) -> None:
    """Negative control: no state and one rate; a warm-up of new slots alone is enough."""
    source = write_checkpoint(tmp_path / "a", family_config("llama", vocab_size=257))
    tiny.grow(source, tmp_path / "b", ffn="x2", symmetry="rms")
    for name, warmup in (("one", 0), ("two", 2)):
        values = recipe_values(text_file, max_steps=2, warmup_steps=0, decay_steps=0)
        values["training"]["new_warmup_steps"] = warmup
        values["model"] = {"checkpoint": str(tmp_path / "b")}
        train(make_recipe(values), tmp_path / name)
    assert copies_apart(tmp_path / "one") == 0.0 < copies_apart(tmp_path / "two")
