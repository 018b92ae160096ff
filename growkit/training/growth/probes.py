"""What becomes of a grown model's parts while it trains: figures every ``probe_steps`` steps.

Each probe is one line of metrics.jsonl under the key ``probe``:

* ``update_norm_old``, ``update_norm_new``: L2 norm of the change that the optimizer step made.
* ``head_similarity``, ``unit_similarity``: mean cosine between each copied query head (FFN unit)
  and the old one that it was copied from; 1 for copies that still are the same.
* ``dead_new_heads``, ``new_heads``: new heads whose contribution to the residual stream is less
  than a thousandth of the median old head's, and how many new heads there are.
* ``expert_load_max``, ``expert_load_min``: of each layer with experts, how often its most and its
  least used expert is chosen, over the mean; 1 and 1 where all are used equally.
* ``lambda``: of each layer of differential attention.
* ``signal_entropy``, ``noise_entropy``: of each layer's attention maps, nats, over the first
  held-out sequences; without noise heads all maps are signal.

A probe runs outside the training graph, draws no random numbers and changes nothing, so a run with
probes is bit for bit the run without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from growkit.core.errors import UsageError
from growkit.data.packing import PackedDataset
from growkit.evaluation.attention_maps import eager, layer_lambda, noise_heads, row_entropy
from growkit.training.expert_load import choices, expert_load
from growkit.training.growth.copies import (
    Pairs,
    dead_new_heads,
    find_copies,
    head_norms,
    similarities,
)
from growkit.training.growth.slots import SlotMap, is_sharded
from growkit.training.growth.trainer_hooks import slots_of
from growkit.training.metrics import append_metrics
from growkit.training.recipe import Recipe

SEQUENCES, TOKENS = 4, 256


class Probes(TrainerCallback):
    """Measures every ``probe_steps`` optimizer steps, and once before the first.

    Args:
        model: with the weights that the run starts from: what is a copy of what is seen in them.
        slots: its new-parameter map.
        held_out: where the attention maps are made.
        pause: told the seconds that a probe took, which are no training time.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        slots: SlotMap,
        held_out: PackedDataset,
        metrics: Path,
        pause: Callable[[float], None],
    ) -> None:
        self.pause = pause
        self.recipe, self.slots, self.metrics = recipe, slots, metrics
        self.every = recipe.training.probe_interval
        self.batch = probe_batch(held_out)
        self.copies = find_copies(model, slots)
        self._before: dict[str, Tensor] = {}
        self._updates: dict[str, float] = {}
        self._model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.recipe.first_step and self._wanted(state):
            self._write(state, {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (state.global_step + 1) % self.every == 0 and self._wanted(state):
            self._before = {
                name: parameter.detach().clone()
                for name, parameter in self._model.named_parameters()
                if parameter.requires_grad
            }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._before:
            self._updates = update_norms(self._model, self._before, self.slots)
            self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 and self._wanted(state):
            self._write(state, self._updates)

    def _wanted(self, state: Any) -> bool:
        """One process measures; of sharded parameters none holds enough."""
        sharded = any(is_sharded(parameter) for parameter in self._model.parameters())
        return bool(state.is_world_process_zero) and not sharded

    def _write(self, state: Any, updates: dict[str, float]) -> None:
        step, started = state.global_step, time.monotonic()
        figures = {**updates, **probe(self._model, self.batch, self.slots, self.copies)}
        row = {"step": step, "tokens": step * self.recipe.tokens_per_step, "probe": figures}
        append_metrics(self.metrics, row)
        self.pause(time.monotonic() - started)


def probes_of(
    recipe: Recipe,
    model: Any,
    dataset: PackedDataset,
    metrics: Path,
    pause: Callable[[float], None],
) -> list[Probes]:
    """The probes of a run; none where the recipe says so, or parameters are not here to be seen.

    A new-parameter map whose names are not those of the model in memory is left aside.
    """
    hidden = any(p.is_meta or is_sharded(p) for p in model.parameters())
    if recipe.training.probe_interval == 0 or hidden:
        return []
    try:
        slots = slots_of(model, recipe)
    except UsageError:
        slots = SlotMap({})
    return [Probes(model, recipe, slots, dataset, metrics, pause)]


def probe_batch(dataset: PackedDataset) -> dict[str, Tensor]:
    """The beginnings of the first sequences, without labels."""
    items = [dataset[i] for i in range(min(SEQUENCES, len(dataset)))]
    return {
        key: torch.stack([item[key][:TOKENS] for item in items])
        for key in items[0]
        if key != "labels"
    }


@torch.no_grad()
def update_norms(model: Any, before: dict[str, Tensor], slots: SlotMap) -> dict[str, float]:
    """L2 norms of the change of old and of new slots."""
    totals = {"old": 0.0, "new": 0.0}
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        squares = (parameter.detach() - before[name]).float().square()
        part = slots.part(name)
        if part == "mixed":
            new = (squares * slots.slots(name).local_to(parameter).mask()).sum().item()
            totals["new"] += new
            totals["old"] += squares.sum().item() - new
        else:
            totals[part] += squares.sum().item()
    return {f"update_norm_{part}": max(total, 0.0) ** 0.5 for part, total in totals.items()}


@torch.no_grad()
def probe(
    model: Any, batch: dict[str, Tensor], slots: SlotMap, copies: dict[str, Pairs]
) -> dict[str, Any]:
    """All figures of a model as it stands; see the head of this module."""
    figures: dict[str, Any] = dict(similarities(model, copies))
    if (found := lambdas(model)) is not None:
        figures["lambda"] = found
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    try:
        with eager(model), head_norms(model) as norms, choices(model) as chosen:
            maps = model(**inputs, use_cache=False, output_attentions=True).attentions
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return figures  # of a class of its own that returns no maps: no reason to end the run
    figures |= entropies(model, maps or ()) | expert_load(chosen)
    return figures | dead_new_heads(norms, slots)


def lambdas(model: Any) -> list[float] | None:
    """lambda of each layer of differential attention; None where lambda is no number per layer."""
    found = [layer_lambda(module) for module in model.modules()]
    return [value for value in found if value is not None] or None


def entropies(model: Any, maps: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Mean entropy in nats of each layer's maps [b, heads, n, n], signal and noise apart."""
    result: dict[str, list[float]] = {}
    layers = getattr(model.get_decoder(), "layers", None)
    for layer, weights in enumerate(maps):
        entropy = row_entropy(weights).mean(dim=(0, 2))
        attention = None if layers is None else getattr(layers[layer], "self_attn", None)
        noise = noise_heads(attention, len(entropy)).to(entropy.device)
        result.setdefault("signal_entropy", []).append(entropy[~noise].mean().item())
        if noise.any():
            result.setdefault("noise_entropy", []).append(entropy[noise].mean().item())
    return result
