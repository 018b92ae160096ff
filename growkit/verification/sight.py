"""What the towers of a multimodal model read, beside token ids: noise of shapes that its class
accepts, made from its config.

Which arguments a class wants is told by the names of its forward pass, and their shapes are tried:
a picture for each row, as pixels, as patches with their grid, or in tiles; or a piece of sound. Its
features stand in the places of placeholder tokens in front of a row's own. What is accepted counts
only where the logits change with the noise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from growkit.verification import model_inputs as inputs

# Argument -> how it is made, and of which shape: ``noise`` for each row of ids, ``joined`` along
# the first dimension or ``packed`` along the last one of a single picture, ``ones``, ``given``
# (these numbers themselves) and ``number`` (one of them) for each row, ``positions`` on a grid.
Given = Mapping[str, tuple[str, tuple[int, ...]]]
_MOST_PLACES = 1200
KINDS = ("image", "audio", "video")
PLACEHOLDERS = re.compile(
    r".*(image|img|audio|sound|speech|media|picture|context|video).*(token_id|token_index)"
)
# How classes say that two sizes are not the same.
_UNEQUAL = (
    r"\(\d+x(\d+) and (\d+)x\d+\)",
    r"normalized_shape=\[(\d+)\].* of size ?\[(?:\d+, )*(\d+)\]",
    r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
)
_BOUNDS = re.compile(r".*(start|begin|end|bos|eos|boi|eoi|boa|eoa|newline|break|pad).*")


@dataclass(frozen=True)
class Sight:
    """What a model is given beside token ids.

    Attributes:
        given: the arguments.
        places: placeholder tokens in front of each row.
        token: the placeholder's id.
        typed: number by which the class wants to be told that these tokens stand for an image or
            a sound; 0: it does not ask.
        beside: what a tower of another kind is given, its placeholders in front of these.
    """

    given: Given
    places: int = 0
    token: int = 0
    typed: int = 0
    beside: Sight | None = None

    @property
    def names(self) -> list[str]:
        """All arguments that towers read."""
        return [*self.given, *(self.beside.names if self.beside else ())]

    def arguments(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        """All arguments of a forward pass over these token ids [batch, length]."""
        front = ids.new_full((len(ids), self.places), self.token)
        whole = torch.cat([front, ids], dim=1)
        made: dict[str, Any] = {"input_ids": whole, **self.made(model, ids)}
        if self.typed:
            made["mm_token_type_ids"] = (whole == self.token).long() * self.typed
        if self.beside is not None:
            other = self.beside.arguments(model, ids)
            before = self.beside.places
            both = torch.cat([other["input_ids"][:, :before], whole], dim=1)
            if self.typed:
                types = other["mm_token_type_ids"][:, :before], made["mm_token_type_ids"]
                made["mm_token_type_ids"] = torch.cat(types, dim=1)
            made = {**other, **made, "input_ids": both}
        return made

    def made(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        """What the towers read."""
        weight = next(model.parameters())
        result: dict[str, Any] = {}
        for name, (kind, shape) in self.given.items():
            if kind == "ones":
                result[name] = torch.ones((len(ids), *shape), dtype=torch.long)
            elif kind == "given":
                result[name] = torch.tensor([list(shape)] * len(ids))
            elif kind == "number":
                result[name] = torch.full((len(ids),), *shape)
            elif kind == "positions":
                high, wide = map(torch.arange, shape)
                result[name] = torch.cartesian_prod(wide, high).repeat(len(ids), 1, 1)
            elif kind == "ids":
                result[name] = ids
            else:
                rows = [inputs.noise(row, shape, weight) for row in ids]
                if kind == "packed":
                    result[name] = torch.cat(rows, dim=-1)[None]
                else:
                    result[name] = torch.cat(rows) if kind == "joined" else torch.stack(rows)
        return result


def open_eyes(model: Any, sight: Sight) -> None:
    """Give a model this beside token ids, whenever it is run by :mod:`model_inputs`."""
    inputs.beside_tokens[model] = sight.arguments


def close_eyes(model: Any) -> None:
    """Run it on token ids alone again, from positions of its own: some classes keep how far those
    of the last pictures were moved, for a batch of that size."""
    inputs.beside_tokens.pop(model, None)
    parts: list[Any] = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    for part in parts:
        if getattr(part, "rope_deltas", None) is not None:
            part.rope_deltas = None


def find_sight(model: Any, ids: torch.Tensor) -> Sight | None:
    """What a multimodal model can be given beside these token ids so that it is seen, by each kind
    of tower that it has; None where nothing of what is tried is accepted."""
    if not inputs.reads_tokens(model) or inputs.is_encoder_decoder(model):
        return None
    whole: Sight | None = None
    for kind in KINDS:
        if (sight := _first_sight(model, ids, kind)) is None:
            continue
        both = replace(sight, beside=whole)
        if whole is None or is_seen(model, both, ids):
            whole = both
    return whole


def _first_sight(model: Any, ids: torch.Tensor, kind: str) -> Sight | None:
    """What is accepted first of a kind."""
    typed = 0
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        typed = {"image": 1, "video": 2, "audio": 3}[kind]
    for given in _inputs(model, kind):
        for token in _placeholders(model.config, kind):
            for places in _numbers(model, given, ids):
                sight = Sight(given, places, token, typed)
                if is_seen(model, sight, ids):
                    return sight
    return None


def feature_width(model: Any, ids: torch.Tensor, kind: str) -> int:
    """Width of what a model makes of an image (or a sound) for its language model; 0 where none is
    accepted."""
    for given in _inputs(model, kind):
        found = _features(model, given, ids)
        if found is not None:
            return found.shape[-1]
    return 0


def is_seen(model: Any, sight: Sight, ids: torch.Tensor) -> bool:
    """The class computes with it, and other noise gives other logits."""
    try:
        given = sight.arguments(model, ids)
        other = sight.arguments(model, ids.flip(0) + 1)
        with torch.no_grad():
            found = inputs.output_of(model(**given))
            changed = inputs.output_of(model(**{**other, "input_ids": given["input_ids"]}))
    except Exception:  # whatever the class objects to
        return False
    return bool(torch.isfinite(found).all()) and not torch.allclose(found, changed, rtol=1e-4)


def _placeholders(config: Any, kind: str = "") -> list[int]:
    """Ids that may stand for an image or a sound, those named so first."""
    found = [
        (name, value)
        for name, value in sorted(vars(config).items())
        if PLACEHOLDERS.fullmatch(name) and not _BOUNDS.fullmatch(name)
        if isinstance(value, int) and value >= 0
    ]
    found.sort(key=lambda entry: kind not in entry[0])
    return list(dict.fromkeys(value for _, value in found)) or [0]


def _numbers(model: Any, given: Given, ids: torch.Tensor) -> Iterator[int]:
    """Numbers of placeholders in a row that may be meant."""
    found = _features(model, given, ids)
    if found is not None:
        count = found.numel() // found.shape[-1] // len(ids)
        if count <= _MOST_PLACES:
            yield count
    elif not _has_features(model):
        counts = {0, 1, 4, _written(model, given, ids)}
        for name, value in vars(model.config).items():
            if re.search(r"seq_len|num_.*tokens|tokens_per", name) and isinstance(value, int):
                counts.add(value)
        yield from sorted(count for count in counts if count <= _MOST_PLACES)


def _written(model: Any, given: Given, ids: torch.Tensor) -> int:
    """Vectors of its hidden size that a row's picture or sound becomes, where the class has no
    function for that: the last ones made before it refuses another number of placeholders."""
    embedding = model.get_input_embeddings()
    width, made = embedding.weight.shape[1], [0]

    def note(module: Any, _: Any, result: Any) -> None:
        fits = isinstance(result, torch.Tensor) and result.shape[-1:] == (width,)
        if fits and module is not embedding:
            made.append(result.numel() // width // len(ids))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model(**Sight(given, 1, _placeholders(model.config)[0]).arguments(model, ids))
    except Exception:  # its refusal
        return made[-1]
    finally:
        for hook in hooks:
            hook.remove()
    return 1


def objection(model: Any, ids: torch.Tensor, number: int) -> tuple[int, int] | None:
    """Two sizes that the class finds unequal in what its towers make of this of the inputs that are
    tried.

    Raises:
        IndexError: so many are not tried.
    """
    given = [given for kind in KINDS for given in _inputs(model, kind)][number]
    said: list[str] = []
    if _features(model, given, ids, said) is None and not said:
        try:
            with torch.no_grad():
                model(**Sight(given, 1, _placeholders(model.config)[0]).arguments(model, ids))
        except Exception as error:  # what it objects to
            said.append(str(error))
    for text in said:
        for pattern in _UNEQUAL:
            if (found := re.search(pattern, text)) and found[1] != found[2]:
                return int(found[1]), int(found[2])
    return None


def _has_features(model: Any) -> bool:
    return any(True for _ in _feature_functions(model))


def _feature_functions(model: Any) -> Iterator[Any]:
    for part in (model, getattr(model, "model", None)):
        for name in ("get_image_features", "get_audio_features", "get_video_features"):
            if (function := getattr(part, name, None)) is not None:
                yield function


def _features(
    model: Any, given: Given, ids: torch.Tensor, said: list[str] | None = None
) -> torch.Tensor | None:
    """What the model makes of it for its language model; ``said`` gets what it objects to."""
    made = Sight(given).made(model, ids)
    for function in _feature_functions(model):
        named = {k: v for k, v in made.items() if k in inspect.signature(function).parameters}
        found: Any = None
        for known in (named, made):
            try:
                with torch.no_grad():
                    found = function(**known)
                break
            except Exception as error:  # another kind of input
                if said is not None:
                    said.append(str(error))
        found = getattr(found, "pooler_output", found)
        if isinstance(found, list | tuple) and found:
            found = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
        if isinstance(found, torch.Tensor):
            return found
    return None


def _inputs(model: Any, kind: str) -> Iterator[Given]:
    """Arguments for towers of a kind that the class may read, those that most classes have
    first."""
    wanted = inspect.signature(model.forward).parameters
    if kind == "image":
        yield from _pictures(model.config, wanted)
    elif kind == "audio" and "input_features" in wanted:
        yield from _sounds(model.config, wanted)
    elif kind == "video" and "pixel_values_videos" in wanted:
        own = any(name.endswith("video_tower") for name, _ in model.named_modules())
        image = inputs.pair_of(getattr(model.config.vision_config, "image_size", None))
        if own and image:  # else films run through the tower that pictures run through
            yield {"pixel_values_videos": ("noise", (8, 3, *image))}


def _pictures(config: Any, wanted: Mapping[str, Any]) -> Iterator[Given]:
    """Pictures as pixels, as patches or in tiles."""
    if "pixel_values" in wanted:
        inner = getattr(config, "vision_config", None) or getattr(config, "vision_model", config)
        patch = inputs.pair_of(getattr(inner, "patch_size", None)) or (14, 14)
        channels = inputs.first_number(inner, "num_channels", "in_channels", "in_chans") or 3
        image = inputs.pair_of(getattr(inner, "image_size", None)) or (4 * patch[0], 4 * patch[1])
        more: dict[str, tuple[str, tuple[int, ...]]] = {}
        if "qformer_input_ids" in wanted:
            more["qformer_input_ids"] = ("ids", ())
        if wanted.keys() & {"image_grid_thw", "image_grid_hw", "target_sizes"}:
            yield from _patches(inner, patch, channels, wanted)
        if "image_position_ids" in wanted:  # as many as are pooled into two tokens
            pool = inputs.first_number(inner, "pooling_kernel_size") or 1
            each = channels * patch[0] * patch[1]
            yield {
                "pixel_values": ("noise", (2 * pool * pool, each)),
                "image_position_ids": ("positions", (2 * pool, pool)),
            }
        if "high_res_pixel_values" in wanted:
            finer = getattr(config, "high_res_vision_config", inner)
            more["high_res_pixel_values"] = (
                "noise",
                (channels, *(inputs.pair_of(getattr(finer, "image_size", None)) or image)),
            )
        if "aspect_ratio_ids" in wanted:
            tiles = inputs.first_number(inner, "max_num_tiles") or 4
            yield {
                "pixel_values": ("noise", (1, tiles, channels, *image)),
                "aspect_ratio_ids": ("given", (1,)),
                "aspect_ratio_mask": ("ones", (1, tiles)),
                "cross_attention_mask": ("ones", (12, 1, tiles)),
            }
        sizes: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        if "image_sizes" in wanted:
            sizes.append({"image_sizes": ("given", image)})
        if "spatial_shapes" in wanted:
            flat = channels * patch[0] * patch[1]
            yield {
                "pixel_values": ("noise", (16, flat)),
                "spatial_shapes": ("given", (4, 4)),
                "pixel_attention_mask": ("ones", (16,)),
            }
        shapes = [(channels, *image), *((tiles, channels, *image) for tiles in (1, 2, 3, 5))]
        for shape in shapes:
            for size in sizes:
                yield {"pixel_values": ("noise", shape), **size, **more}
        if "image_attention_mask" in wanted:
            more["image_attention_mask"] = ("ones", (12, 1))
            yield {"pixel_values": ("noise", (1, channels, *image)), **more}


def _patches(
    inner: Any, patch: tuple[int, int], channels: int, wanted: Mapping[str, Any]
) -> Iterator[Given]:
    """Pictures cut into patches, with their grid: as few as the class joins into two tokens."""
    merge = inputs.pair_of(getattr(inner, "spatial_merge_size", None))
    merge = merge or inputs.pair_of(getattr(inner, "merge_size", None))
    merge = merge or inputs.pair_of(getattr(inner, "merge_kernel_size", None)) or (2, 2)
    times = inputs.first_number(inner, "temporal_patch_size") or 1
    high, wide = 2 * merge[0], merge[1]
    if "target_sizes" in wanted:
        for sides in ((high, wide), (4, 4), (8, 4)):
            pixels = ("packed", (channels, patch[0], patch[1] * sides[0] * sides[1]))
            yield {"pixel_values": pixels, "target_sizes": ("given", sides)}
        return
    grid: dict[str, tuple[str, tuple[int, ...]]] = {}
    if "image_grid_thw" in wanted:
        grid["image_grid_thw"] = ("given", (1, high, wide))
    if "image_grid_hw" in wanted:
        grid["image_grid_hw"] = ("given", (high, wide))
    if "image_merge_sizes" in wanted:
        grid["image_merge_sizes"] = ("number", (merge[0],))
    for each in ((times * channels * patch[0] * patch[1],), (channels, *patch)):
        yield {"pixel_values": ("joined", (high * wide, *each)), **grid}


def _sounds(config: Any, wanted: Mapping[str, Any]) -> Iterator[Given]:
    """Pieces of sound, as features of it."""
    inner = getattr(config, "audio_config", None) or getattr(config, "encoder_config", config)
    bins = inputs.first_number(inner, "num_mel_bins", "input_dim", "feature_size") or 80
    long = 2 * (inputs.first_number(inner, "max_source_positions") or 1500)
    mask = next((n for n in wanted if "features_mask" in n or n == "feature_attention_mask"), "")
    for shape, frames in (((bins, long), long), ((32, bins), 32), ((bins, 32), 32)):
        masked = {mask: ("ones", (frames,))} if mask else {}
        yield {"input_features": ("noise", shape), **masked}
