"""Tiny float64 runs whose optimizer state is grown, and what the state of the grown model must be.

Weights and moments are float64, so that a rule that holds is seen to hold to 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_checkpoints as tiny
import torch
from transformers import AutoModelForCausalLM

from growkit.growing import grow_checkpoint
from growkit.optimizer_state.store import FOLDER, read_store
from growkit.surgery.request import GrowthRequest
from growkit.verification.loading import register_own_models

GDA = tiny.gda_config(4, 2, 1, hidden_size=16, intermediate_size=12, vocab_size=256)
LLAMA = tiny.llama_config(4, 2, intermediate_size=12)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
Rule = Callable[[str, torch.Tensor], torch.Tensor]


def load(folder: Path) -> Any:
    """The model of a folder, float64."""
    register_own_models()
    config = tiny.read_config(folder)
    mixture = "num_local_experts" in config
    # The grouped matrix product of experts knows no float64.
    options = {"experts_implementation": "eager"} if mixture else {}
    attention = "eager" if config["model_type"] == "gpt_oss" else "sdpa"  # for its sinks
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=attention, **options
    )


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(256, (2, 10), generator=generator)


def loss_of(model: Any, step: int) -> torch.Tensor:
    ids = batch(step)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def gradients(model: Any, step: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, step).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def steps(model: Any, optimizer: Any, first: int, count: int) -> Iterator[float]:
    """Losses before each step."""
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def two_groups(model: Any) -> list[dict[str, Any]]:
    """transformers' grouping: matrices decay, norms do not; in the order of the parameters."""
    named = list(model.named_parameters())
    decayed = [p for n, p in named if "norm" not in n and "subln" not in n]
    kept = [p for n, p in named if "norm" in n or "subln" in n]
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


@dataclass
class Run:
    """A run stopped in the middle: its folder, model and optimizer."""

    folder: Path
    model: Any
    optimizer: Any


def run(folder: Path, config: tiny.Config, *, done: int = 8) -> Run:
    """Train ``done`` steps in float64 and save like Trainer does."""
    model = load(tiny.make_folder(folder.with_name(folder.name + "-start"), config, "F64"))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}], **OPTIONS)
    for _ in steps(model, optimizer, 0, done):
        pass
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return Run(folder, model, optimizer)


def grow(source: Path, out: Path, **request: Any) -> dict[str, Any]:
    """Grow with the state; the manifest."""
    options = {k: request.pop(k) for k in ("optimizer_from", "warn", "threads") if k in request}
    if "warn" in options:
        options["reporter"] = tiny.Told(options.pop("warn"))
    _, manifest = grow_checkpoint(source, out, GrowthRequest(**request), verify=False, **options)
    return manifest


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> moment -> values of a grown folder's state."""
    state = read_store(folder / FOLDER)
    return {
        name: {kind: torch.from_numpy(moment.read()) for kind, moment in found.moments.items()}
        for name, found in state.parameters.items()
    }
