"""Where two models part: the residual stream after each decoder layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from growkit.verify.folder import Folder
from growkit.verify.report import LayerDifference
from growkit.verify.tolerance import tolerance


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The outermost list of as many modules as the config has layers, whatever its name."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return min(lists, key=lambda found: found[:2])[2] if lists else None


@contextlib.contextmanager
def recorded_residuals(layers: nn.ModuleList) -> Iterator[list[torch.Tensor]]:
    """Collect ``[batch, length, hidden]`` before the first layer, then after each layer."""
    streams: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        streams.append(output if isinstance(output, torch.Tensor) else output[0])

    handles: list[Any] = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def layer_pairs(b: Folder, layers_a: int, layers_b: int) -> tuple[list[tuple[int, int]], str]:
    """Pairs (layer of B, layer of A) whose output must be equal, and a note when there are none.

    -1 is the embedding output. B's manifest says what each layer is made of; an identity block
    leaves the stream where the layers before it brought it. From the first layer that is neither
    a copy in order nor an identity (stacking, interpolation) nothing can be compared.
    """
    sources = b.plan.get("layer_sources")
    if not isinstance(sources, list) or len(sources) != layers_b:
        if layers_a == layers_b:
            return [(i, i) for i in range(-1, layers_b)], ""
        return [], (
            f"layers not compared one by one: {layers_a} against {layers_b}, and no growkit.json "
            "says which layer is which"
        )
    pairs, reached = [(-1, -1)], -1
    for layer, entry in enumerate(sources):
        if entry.get("kind") in ("kept", "copy") and entry.get("source") == reached + 1:
            reached += 1
        elif entry.get("kind") != "identity":
            return pairs, f"layers not compared from layer {layer} on: it continues no layer of A"
        pairs.append((layer, reached))
    return pairs, ""


def compare_layers(
    model_a: Any,
    model_b: Any,
    batches: list[torch.Tensor],
    b: Folder,
    *,
    compute: torch.dtype,
    storage: torch.dtype,
    storage_rounding: bool,
) -> tuple[list[LayerDifference], str]:
    """Largest difference after each layer, over all batches; and a note when it is impossible."""
    list_a, list_b = decoder_layers(model_a), decoder_layers(model_b)
    if list_a is None or list_b is None:
        return [], "layers not compared one by one: the model has no list of decoder layers"
    pairs, note = layer_pairs(b, len(list_a), len(list_b))
    factor = b.plan.get("hidden_factor")
    found: dict[int, tuple[float, float]] = {}
    for ids in batches if pairs else []:
        with recorded_residuals(list_a) as streams_a, recorded_residuals(list_b) as streams_b:
            model_a(input_ids=ids, use_cache=False)
            model_b(input_ids=ids, use_cache=False)
        for layer, source in pairs:
            left, right = streams_a[source + 1], streams_b[layer + 1]
            width = left.shape[-1]
            if right.shape[-1] != width and not isinstance(factor, (int, float)):
                return [], (
                    f"layers not compared one by one: hidden size {width} against "
                    f"{right.shape[-1]}, and no growkit.json gives the factor"
                )
            if isinstance(factor, (int, float)):
                left, right = left * factor, right[..., :width]
            worst = zip(found.get(layer, (0.0, 0.0)), _differences(left, right), strict=True)
            absolute, relative = (max(pair) for pair in worst)
            found[layer] = (absolute, relative)
    return [
        LayerDifference(
            layer,
            source,
            *found[layer],
            tolerance(1.0, layer + 1, compute, storage=storage, storage_rounding=storage_rounding),
        )
        for layer, source in pairs
    ], note


def _differences(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest ``|a - b|``, and the largest relative one as LayerDifference defines it."""
    a, b = a.double(), b.double()
    # NaN compares false with everything: count it as an infinite difference.
    absolute = torch.nan_to_num((a - b).abs(), nan=torch.inf)
    size = a.abs() + a.square().mean(-1, keepdim=True).sqrt()
    relative = absolute / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(absolute.max()), float(relative.max())


def first_non_finite(model: Any, batches: list[torch.Tensor]) -> int | None:
    """First layer whose residual stream holds NaN or infinity (-1: the embeddings)."""
    layers = decoder_layers(model)
    if layers is None:
        return None
    first: int | None = None
    for ids in batches:
        with recorded_residuals(layers) as streams:
            model(input_ids=ids, use_cache=False)
        for layer, stream in enumerate(streams, start=-1):
            if not bool(torch.isfinite(stream).all()):
                first = layer if first is None else min(first, layer)
                break
    return first


def describe(layers: list[LayerDifference]) -> str:
    """Where the difference begins, for the cause of a failure; empty when nothing was compared."""
    if not layers:
        return ""
    first = next((layer for layer in layers if not layer.within), None)
    if first is None:
        last = layers[-1]
        return (
            f"every compared residual stream is equal up to layer {last.layer} "
            f"(max |d| {last.max_difference:.3g})"
        )
    figures = (
        f"max |d| {first.max_difference:.3g}, relative {first.relative_difference:.3g}, "
        f"tolerance {first.tolerance:.3g}"
    )
    if first.layer < 0:
        return f"the embeddings differ already ({figures})"
    return f"the residual stream first differs after layer {first.layer} of B ({figures})"
