"""Stored tensors beside those of a family's table: what the class does not read, and the parts of
quantised weights.

Layers for multi-token prediction are kept by many checkpoints and read by no class of transformers,
only by inference engines. They stand behind the last layer (DeepSeek-V3, GLM-4.5), under the number
that a further layer would have, or beside the layers (``mtp.``, Qwen3-Next). Growth copies them,
behind a new last layer under its number. They are as wide as the model, so that another width
cannot be given to the others alone.

FP8 weights have a scale for each block of 128 x 128 (``weight_scale_inv``), MXFP4 ones are two
tensors (``_blocks``, ``_scales``). Layers are copied with their bytes and scales; bytes of zero are
zero in both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, Dim, Family, Tensor, behind_the_last
from growkit.families.unit_layout import constant

# Config fields that count layers for multi-token prediction.
PREDICTION_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
_BESIDE = re.compile(r"(^|.*\.)mtp\..*")
# What a class ignores and growth need not copy: buffers that it computes.
_COMPUTED = re.compile(r".*(inv_freq|masked_bias|\.attn\.bias|attention\.bias|position_ids).*")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
STATED = "quantization_config"
SCALE = "_scale_inv"
PACKED = ("_blocks", "_scales")
# Lists of quantization_config that name modules.
_MODULE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "modules_to_convert")


def with_stored_parts(family: Family, config: Config, names: Collection[str]) -> Family:
    """The family with what else a checkpoint of these tensors stores.

    Args:
        family: of its config.
        config: of the checkpoint.
        names: name -> its header entry; the names alone tell nothing.
    """
    if not isinstance(names, Mapping) or not names:
        return family
    shapes = {n: tuple(info.shape) for n, info in names.items() if hasattr(info, "shape")}
    stored = _first_parts(shapes)
    parted = tuple(part for tensor in family.tensors for part in _parts(tensor, stored))
    unread = tuple(_unread(family, config, shapes))
    if not (unread or stored or family.unread):
        return family
    roles = tuple(tensor.role for tensor in unread)
    return replace(family, tensors=parted + unread, unread=roles)


def _unread(
    family: Family, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Tensor]:
    """The tensors that the class does not read, as they are."""
    prefix = next((t.name.split("{layer}")[0] for t in family.tensors if t.per_layer), None)
    layers = None
    carried = {tensor.name for tensor in family.tensors}

    def ignored(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in family.unread)

    for name, shape in shapes.items():
        if _COMPUTED.fullmatch(name) or name in carried:
            continue
        own = name
        if prefix and name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            layers = family.sizes(config)["layer"] if layers is None else layers
            behind = int(number) - layers if number.isdigit() else -1
            if behind < 0 or not (behind < prediction_layers(config) or ignored(name)):
                continue
            own = f"{prefix}{behind_the_last(behind)}.{rest}"
        elif not (_BESIDE.fullmatch(name) or ignored(name)):
            continue
        yield Tensor(name, own, tuple(Dim(constant(width)) for width in shape), init="zeros")


def prediction_layers(config: Config) -> int:
    """Layers for multi-token prediction that a config counts."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    counts = [part.get(field) for part in parts for field in PREDICTION_LAYERS]
    return max((n for n in counts if isinstance(n, int) and not isinstance(n, bool)), default=0)


def without(family: Family, pattern: str) -> Family:
    """The family without the unread tensors whose whole name a regular expression matches.

    Raises:
        UsageError: it is none, or it matches none of them, or one that the class reads.
    """
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--drop-tensors {pattern!r} is no regular expression ({error}).",
            r"Write for example: --drop-tensors 'mtp\..*'.",
        ) from error
    dropped = {role for role in family.unread if rule.fullmatch(role)}
    if not dropped:
        shown = ", ".join(family.unread[:3]) + (" ..." if len(family.unread) > 3 else "")
        raise UsageError(
            f"--drop-tensors {pattern!r} matches no tensor that the class does not read.",
            f"Such tensors of this checkpoint: {shown or 'none'}.",
        )
    return replace(
        family,
        tensors=tuple(t for t in family.tensors if t.role not in dropped),
        unread=tuple(role for role in family.unread if role not in dropped),
        ignored=(*family.ignored, *map(re.escape, sorted(dropped))),
    )


def without_prediction(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that counts no layers for multi-token prediction."""
    result = dict(config)
    for name, value in config.items():
        if name in PREDICTION_LAYERS and value:
            result[name] = 0
        elif isinstance(value, Mapping) and name.endswith("config"):
            result[name] = without_prediction(value)
    return result


# -- quantised weights ----------------------------------------------------------------------------


def _first_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name without its numbers -> shape, of what is stored beside weights or in their place."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith((SCALE, *PACKED)):
            found.setdefault(_NUMBER.sub("#", name), shape)
    return found


def _parts(tensor: Tensor, stored: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """A tensor as it is stored: itself, and its scales; or packed blocks and their scales."""
    name = _NUMBER.sub("#", tensor.name.replace("{layer}", "0").replace("{expert}", "0"))
    packed = [stored.get(name + suffix) for suffix in PACKED]
    if tensor.per_layer and all(packed):
        for suffix, shape in zip(PACKED, packed, strict=True):
            yield _part(tensor, suffix, shape or ())
        return
    yield tensor
    if tensor.per_layer and (scale := stored.get(name + SCALE)):
        yield _part(tensor, SCALE, scale)


def _part(tensor: Tensor, suffix: str, shape: Sequence[int]) -> Tensor:
    """One part; packed blocks of zeros close a layer as the weight would."""
    return replace(
        tensor,
        role=tensor.role + suffix,
        name=tensor.name + suffix,
        dims=tuple(Dim(constant(width)) for width in shape),
        writes_residual=tensor.writes_residual and suffix == PACKED[0],
        gain_offset=0.0,
        init="zeros",
        values=2 if suffix == PACKED[0] else 0,
    )


def moved_quantisation(
    config: Mapping[str, Any], prefix: str, sources: Sequence[int]
) -> dict[str, Any]:
    """A config whose lists of modules that are quantised, or not, follow layers that have moved.

    Args:
        config: of the source.
        prefix: what stands before the number of a layer in names of tensors.
        sources: old layer of each new one.
    """
    stated = config.get(STATED)
    if not isinstance(stated, Mapping):
        return dict(config)
    stem = prefix.rstrip(".").rpartition(".")[2]
    layer = re.compile(rf"((?:.*\.)?{re.escape(stem)}\.)(\d+)((?:\..*)?)")
    moved = dict(stated)
    for field in _MODULE_LISTS:
        modules = stated.get(field)
        if isinstance(modules, list):
            moved[field] = list(
                dict.fromkeys(name for module in modules for name in _moved(module, layer, sources))
            )
    return {**config, STATED: moved}


def _moved(module: Any, layer: re.Pattern[str], sources: Sequence[int]) -> list[Any]:
    """The names of a module in the layers that are made of its own."""
    found = layer.fullmatch(module) if isinstance(module, str) else None
    if found is None:
        return [module]
    before, number, behind = found.groups()
    return [f"{before}{new}{behind}" for new, old in enumerate(sources) if old == int(number)]
