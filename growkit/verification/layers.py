"""Where two models part: the residual stream after each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from growkit.core.errors import GrowkitError
from growkit.families import family_of
from growkit.verification.model_inputs import arguments, is_encoder_decoder, stack_depths
from growkit.verification.report import LayerDifference
from growkit.verification.tolerance import tolerance
from growkit.verification.written_folder import Folder


def layer_stacks(model: Any) -> dict[str, nn.ModuleList]:
    """The layers of a decoder under "", those of an encoder-decoder under its two names.

    A stack is the outermost list of as many modules as the config has layers, whatever its name;
    a model without one, or of no layers, gives an empty dict.
    """
    wanted, counts = {"": model}, stack_depths(model)
    if is_encoder_decoder(model):
        wanted = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    result = {}
    for stack, part in wanted.items():
        lists = [
            (name.count("."), name, module)
            for name, module in part.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == counts[stack]
        ]
        if not lists or not counts[stack]:
            return {}
        result[stack] = min(lists, key=lambda found: found[:2])[2]
    return result


@contextlib.contextmanager
def recorded_stacks(
    stacks: Mapping[str, nn.ModuleList],
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """:func:`recorded_residuals` of several stacks at once."""
    with contextlib.ExitStack() as open_hooks:
        yield {
            stack: open_hooks.enter_context(recorded_residuals(layers))
            for stack, layers in stacks.items()
        }


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


def layer_pairs(
    b: Folder, stack: str, layers_a: int, layers_b: int
) -> tuple[list[tuple[int, int]], str]:
    """Pairs (layer of B, layer of A) whose output must be equal, and a note when there are none.

    -1 is the embedding output. B's manifest says what each layer is made of; an identity block
    leaves the stream where the layers before it brought it. From the first layer that is neither
    a copy in order nor an identity (stacking, interpolation) nothing can be compared.
    """
    sources = b.plan.get("decoder_layer_sources" if stack == "decoder" else "layer_sources")
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
            where = f"{stack} layer {layer}".strip()
            return pairs, f"layers not compared from {where} on: it continues no layer of A"
        pairs.append((layer, reached))
    if _passes_on(b):  # only the last of a run of identity layers ends in the old norm
        kinds = [entry.get("kind") for entry in sources] + [""]
        pairs = [(layer, old) for layer, old in pairs if kinds[layer + 1] != "identity"]
    return pairs, ""


def _passes_on(b: Folder) -> bool:
    """Norms at the end of its layers passed their numbers on to the identity layers behind them."""
    try:
        tensors = family_of(b.config).tensors
    except GrowkitError:  # no family that this growkit knows
        return False
    return any(tensor.passes_on is not None for tensor in tensors)


def compare_layers(
    model_a: Any,
    model_b: Any,
    batches: list[torch.Tensor],
    b: Folder,
    *,
    compute: torch.dtype,
    storage: torch.dtype,
    storage_rounding: bool,
    amplification: float = 1.0,
) -> tuple[list[LayerDifference], str]:
    """Largest difference after each layer, over all batches; and a note when it is impossible."""
    stacks_a, stacks_b = layer_stacks(model_a), layer_stacks(model_b)
    if not stacks_a or stacks_a.keys() != stacks_b.keys():
        return [], "layers not compared one by one: the model has no list of layers"
    pairs: list[tuple[str, int, int]] = []
    notes = []
    for stack, layers in stacks_b.items():
        known, note = layer_pairs(b, stack, len(stacks_a[stack]), len(layers))
        pairs += [(stack, layer, source) for layer, source in known]
        notes += [note] if note else []
    factor = b.plan.get("hidden_factor")
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for ids in batches if pairs else []:
        with recorded_stacks(stacks_a) as streams_a, recorded_stacks(stacks_b) as streams_b:
            model_a(**arguments(model_a, ids))
            model_b(**arguments(model_b, ids))
        for stack, layer, source in pairs:
            left, right = streams_a[stack][source + 1], streams_b[stack][layer + 1]
            width = left.shape[-1]
            if right.shape[-1] != width and not isinstance(factor, (int, float)):
                return [], (
                    f"layers not compared one by one: hidden size {width} against "
                    f"{right.shape[-1]}, and no growkit.json gives the factor"
                )
            if isinstance(factor, (int, float)):
                left, right = left * factor, right[..., :width]
            before = found.get((stack, layer), (0.0, 0.0))
            worst = zip(before, _differences(left, right), strict=True)
            absolute, relative = (max(pair) for pair in worst)
            found[stack, layer] = (absolute, relative)
    before_decoder = len(stacks_b["encoder"]) if "encoder" in stacks_b else 0
    return [
        LayerDifference(
            layer,
            source,
            *found[stack, layer],
            amplification
            * tolerance(
                1.0,
                layer + 1 + (before_decoder if stack == "decoder" else 0),
                compute,
                storage=storage,
                storage_rounding=storage_rounding,
            ),
            stack,
        )
        for stack, layer, source in pairs
    ], "; ".join(notes)


def _differences(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest ``|a - b|``, and the largest relative one as LayerDifference defines it."""
    a, b = a.double(), b.double()
    # NaN compares false with everything: count it as an infinite difference.
    absolute = torch.nan_to_num((a - b).abs(), nan=torch.inf)
    size = a.abs() + a.square().mean(-1, keepdim=True).sqrt()
    relative = absolute / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(absolute.max()), float(relative.max())


def first_non_finite(model: Any, batches: list[torch.Tensor]) -> str:
    """Where the residual stream first holds NaN or infinity; empty when nowhere."""
    stacks = layer_stacks(model)
    firsts: dict[str, int] = {}
    for ids in batches if stacks else []:
        with recorded_stacks(stacks) as streams:
            model(**arguments(model, ids))
        for stack, recorded in streams.items():
            wrong = [i for i, s in enumerate(recorded, -1) if not bool(torch.isfinite(s).all())]
            if wrong:
                firsts[stack] = min(wrong[0], firsts.get(stack, wrong[0]))
    for stack in stacks:
        if stack in firsts:
            layer = firsts[stack]
            return "the embeddings" if layer < 0 else f"{stack} layer {layer}".strip()
    return ""


def describe(layers: list[LayerDifference]) -> str:
    """Where the difference begins, for the cause of a failure; empty when nothing was compared."""
    if not layers:
        return ""
    first = next((layer for layer in layers if not layer.within), None)
    if first is None:
        last = layers[-1]
        return (
            f"every compared residual stream is equal up to {last.place} "
            f"(max |d| {last.max_difference:.3g})"
        )
    figures = (
        f"max |d| {first.max_difference:.3g}, relative {first.relative_difference:.3g}, "
        f"tolerance {first.tolerance:.3g}"
    )
    if first.layer < 0:
        return f"the embeddings differ already ({figures})"
    return f"the residual stream first differs after {first.place} of B ({figures})"
