"""What every attention measure reads: softmax maps layer by layer, and what is made of them.

Maps come from the model's own eager attention, one layer at a time, so that the memory is that of
one layer. Differential attention is read as what it computes: signal maps, noise maps, and the
difference map ``signal - lambda * sum of the group's noise`` that the values really meet.

Attention entropy: how widely each head group spreads its attention, layer by layer.

Nats, a mean over positions, heads and windows; and the same divided by the largest entropy that the
position can have, log of the number of keys that it sees (0: one key, 1: even). Positions that see
one key are left out: they have no choice. A difference map is read as |w| over the sum of |w|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from growkit.core.errors import CheckpointError
from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.model import LoadedModel, check_causal
from growkit.families import Family, differential, sizes_where_known
from growkit.families.differential import LAMBDA_ROLES, signal_to_noise
from growkit.families.unit_layout import Sizes


@dataclass(frozen=True)
class LayerMaps:
    """The attention of one layer, as its forward pass computed it.

    Attributes:
        module: the attention module.
        maps: softmax maps [b, heads, n, n], in the module's order of heads.
        visible: keys that each query may see, [b or 1, n] (causal mask, sliding window).
        noise: which heads are subtracted, bool [heads]; none in ordinary attention.
        strength: lambda of each signal head at each query, [b or 1, signal heads or 1, n or 1, 1];
            None in ordinary attention.
    """

    module: Any
    maps: Tensor
    visible: Tensor
    noise: Tensor
    strength: Tensor | None

    def last_rows(self) -> LayerMaps:
        """The same of the last position alone: maps [b, heads, 1, n]."""
        strength = self.strength
        if strength is not None and strength.shape[2] > 1:
            strength = strength[:, :, -1:]
        return replace(
            self, maps=self.maps[:, :, -1:], visible=self.visible[:, -1:], strength=strength
        )

    def groups(self) -> dict[str, Tensor]:
        """``effective`` maps, and with noise heads ``signal`` and ``noise`` apart, float64.

        ``effective`` [b, signal heads, n, n] is ``signal - lambda * sum of the group's noise``:
        rows may hold negative weights and sum to 1 - lambda * noise heads. In ordinary attention
        these are the softmax maps. In SAS they are the maps of the simulated heads, each of which
        meets values of its own.
        """
        maps = self.maps.double()
        if self.strength is None:
            return {"effective": maps}
        signal, noise = maps[:, ~self.noise], maps[:, self.noise]
        return {
            "effective": signal - self.strength * self._subtracted(signal, noise),
            "signal": signal,
            "noise": noise,
        }

    def _subtracted(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Summed noise map of each signal head."""
        known = _known_maps(self.module)
        assert known is not None
        of_group = torch.from_numpy(signal_to_noise(known[1])).to(noise.device)
        return noise[:, of_group].sum(2)


def observe(model: Any, take: Callable[[int, LayerMaps], None], **inputs: Any) -> Any:
    """Run the model once with eager attention; ``take(layer, maps)`` sees each layer in order.

    The model is in evaluation mode meanwhile, and as it was afterwards.

    Args:
        inputs: of the forward pass; ``use_cache`` is False.

    Returns:
        The model's output.

    Raises:
        UsageError: an encoder-decoder.
        CheckpointError: the model's class shows no attention maps.
    """
    check_causal(model)
    taken = 0
    last: Tensor | None = None

    def see(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        nonlocal taken, last
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        # Whatever returns a square map beside its output is attention; older classes hand the same
        # map up through their blocks, where it is not another layer.
        if not _is_map(maps) or maps is last:
            return
        last = maps
        hidden = args[0] if args else kwargs["hidden_states"]
        keys = visible_keys(kwargs.get("attention_mask"), maps.shape[-1], maps.device)
        visible = keys[:, 0].sum(-1)
        noise = noise_heads(module, maps.shape[1]).to(maps.device)
        strength = _strength(module, hidden) if bool(noise.any()) else None
        take(taken, LayerMaps(module, maps, visible, noise, strength))
        taken += 1

    hooks = [
        module.register_forward_hook(see, with_kwargs=True)
        for module in model.modules()
        if module is not model
    ]
    try:
        with eager(model), torch.no_grad():
            result = model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not taken:
        raise CheckpointError(
            f"{type(model).__name__} returns no attention maps, even with eager attention.",
            "Measure its text and its retrieval instead: those need no maps.",
        )
    return result


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that returns its maps, in evaluation mode; both as they were afterwards."""
    training, before = model.training, model.config._attn_implementation
    model.eval()
    try:
        if before != "eager":
            model.set_attn_implementation("eager")
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
        model.train(training)


def noise_heads(module: Any, count: int) -> Tensor:
    """Which of an attention module's ``count`` maps are subtracted, bool ``[count]``."""
    known = _known_maps(module)
    if known is None:
        return torch.zeros(count, dtype=torch.bool)
    return torch.from_numpy(differential.noise_heads(*known))


def layer_lambda(module: Any) -> float | None:
    """lambda of a layer of differential attention where it is one number per layer, else None."""
    if not all(hasattr(module, name) for name in (*LAMBDA_ROLES, "lambda_init")):
        return None
    q1, k1, q2, k2 = (getattr(module, name).double() for name in LAMBDA_ROLES)
    difference = (q1 * k1).sum().exp() - (q2 * k2).sum().exp()
    return float(difference) + float(module.lambda_init)


def row_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row of maps [..., n, n]: [..., n].

    Rows are read as distributions: absolute weights over their sum, which changes nothing in a
    softmax map and makes a difference map comparable with one.
    """
    weights = weights.double().abs()
    total = weights.sum(-1, keepdim=True)
    # A row of zeros (signal and noise cancel) spreads nothing: its entropy is taken as 0.
    shares = weights / total.where(total > 0, torch.ones_like(total))
    return torch.special.entr(shares).sum(-1)


def _known_maps(module: Any) -> tuple[Family, Sizes] | None:
    """Family and sizes of a layer of differential attention; None for any other."""
    known = sizes_where_known(getattr(module, "config", None))
    sizes = None if known is None else differential.map_sizes(*known)
    return None if known is None or sizes is None else (known[0], sizes)


def _is_map(tensor: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() == 4
        and tensor.is_floating_point()
        and tensor.shape[-1] == tensor.shape[-2]
    )


def _strength(module: Any, hidden_states: Tensor) -> Tensor:
    """lambda as LayerMaps has it: one number per layer, or one per token and signal head."""
    if (fixed := layer_lambda(module)) is not None:
        return torch.full((1, 1, 1, 1), fixed, dtype=torch.float64, device=hidden_states.device)
    gate = torch.sigmoid(module.lambda_proj(hidden_states).double())  # [b, n, signal heads]
    return gate.transpose(1, 2).unsqueeze(-1)


def visible_keys(mask: Any, queries: int, device: torch.device) -> Tensor:
    """Which keys each query may see, bool [b or 1, 1, n, n]: of a mask of four dimensions, additive
    or boolean, else causal.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return torch.ones(queries, queries, dtype=torch.bool, device=device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask > torch.finfo(mask.dtype).min / 2
    # A token sees itself, which tells masks of what is seen from masks of what is not (MPT).
    return mask if bool(mask.diagonal(dim1=-2, dim2=-1).all()) else ~mask


@dataclass(frozen=True)
class Entropy:
    """Entropy of one head group of one layer.

    Attributes:
        nats: mean entropy.
        normalised: mean of entropy / log(keys that are seen).
    """

    nats: float
    normalised: float


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of all layers.

    Attributes:
        tokens: positions of the windows, each measured in every head.
        window: tokens of a window: entropy in nats grows with it.
        mean: kind of map (``effective``, and of differential attention ``signal`` and ``noise``) ->
            mean over layers.
        layers: the same of each layer.
    """

    tokens: int
    window: int
    mean: dict[str, Entropy]
    layers: tuple[dict[str, Entropy], ...]


def measure_entropy(
    loaded: LoadedModel, windows: Tensor, *, progress: Progress | None = None
) -> AttentionEntropy:
    """Measure token ids ``windows`` [windows, n]; ``progress`` is advanced by 1 a window.

    Raises:
        UsageError, CheckpointError: the model shows no maps; see
            :func:`growkit.evaluation.attention_maps.observe`.
    """
    bar = progress or SilentProgress()
    found: dict[tuple[int, str], list[Tensor]] = {}

    def take(layer: int, attention: LayerMaps) -> None:
        for name, maps in attention.groups().items():
            both = _entropy(maps, attention.visible)
            found.setdefault((layer, name), []).append(both.cpu())

    for window in windows.to(loaded.device):
        observe(loaded.model, take, input_ids=window[None])
        bar.advance(1)
    layers: list[dict[str, Entropy]] = [{} for _ in range(1 + max(layer for layer, _ in found))]
    for (layer, name), measured in found.items():
        layers[layer][name] = Entropy(*torch.stack(measured).mean(0).tolist())
    names = list(dict.fromkeys(name for _, name in found))
    mean = {name: _mean([layer[name] for layer in layers if name in layer]) for name in names}
    return AttentionEntropy(windows.numel(), windows.shape[1], mean, tuple(layers))


def _entropy(maps: Tensor, visible: Tensor) -> Tensor:
    """Mean entropy and mean normalised entropy of maps [b, heads, n, n]: [2]."""
    chosen = (visible > 1).expand(len(maps), -1)
    entropy = row_entropy(maps).transpose(1, 2)[chosen]  # [rows, heads]
    largest = visible.expand(len(maps), -1)[chosen].double().log()
    return torch.stack([entropy.mean(), (entropy / largest[:, None]).mean()])


def _mean(values: list[Entropy]) -> Entropy:
    count = len(values)
    return Entropy(
        sum(value.nats for value in values) / count,
        sum(value.normalised for value in values) / count,
    )
