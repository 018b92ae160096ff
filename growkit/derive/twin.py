"""A twin: the user's own config with every flag kept and few, small sizes, that a class accepts.

What makes a model large is taken away (depth, hidden size, vocabulary, numbers of heads and
experts, widths), and nothing else: a twin takes the same branches of the class as the model does.
Names of config fields only say what to try first; whatever the class refuses is left as it was, and
what is still too large is halved field by field. Classes are built on the meta device meanwhile,
so that a config of 10^12 parameters costs no more than a small one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.core.errors import GrowkitError
from growkit.families.layer_fields import (
    LABELS,
    factor_fields,
    factor_stated,
    is_index_list,
    leaf,
    move_entry,
    move_sections,
    with_values,
)
from growkit.verification.loading import class_of, reason
from growkit.verification.model_inputs import outputs
from growkit.verification.sight import Sight, open_eyes

Path = tuple[str, ...]
Values = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

MOST_PARAMETERS = 4_000_000
LARGEST = 8_000_000  # of a class that cannot be made so small
MOST_LAYERS = 12
TOKENS = (2, 12)


class Underivable(GrowkitError):
    """What stands in the way of a derived table, in one sentence."""

    def __init__(self, cause: str, remedy: str = "growkit has no table for this model.") -> None:
        super().__init__(cause, remedy)


def said_by(error: Exception) -> str:
    """What a class objects to, in one line."""
    if isinstance(error, GrowkitError):
        return error.cause.rstrip(".")
    return f"{type(error).__name__}: {reason(error)[:200]}"


def integers(config: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, int]]:
    """(path, value) of every whole number of the config, those of its parts included."""
    for name, value in config.items():
        if isinstance(value, bool) or name.startswith("_"):
            continue
        if isinstance(value, int):
            yield (*prefix, name), value
        elif isinstance(value, Mapping) and not (
            name in ("rope_parameters", "rope_scaling", "label2id")
            or any(not str(key).isidentifier() for key in value)  # of layers, or of tokens
        ):
            yield from integers(value, (*prefix, name))


def as_held(config: Any) -> tuple[Values, dict[str, Any]]:
    """What a config says, in the form in which its class holds it; and where that writes another
    one (Dory: two entries for each layer, attention and FFN): entries for each layer, the fields
    that count them, the list, and the words that stand there alone. Empty where it does not."""
    values: Values = json.loads(json.dumps(config.to_dict(), default=str))
    held = {name: vars(config).get(name) for name in values}
    for name, value in values.items():
        own = held[name]
        if not (isinstance(value, list) and isinstance(own, list) and 0 < len(own) < len(value)):
            continue
        each = len(value) // len(own)
        fields = [n for n, v in values.items() if type(held[n]) is int and v == each * held[n] > 0]
        if value[::each] == own and fields:
            blocks = {"each": each, "list": name, "fields": fields}
            values |= {n: held[n] for n in (name, *fields)}
            return values, blocks | {"words": sorted({str(v) for v in value} - set(map(str, own)))}
    return values, {}


# -- building -------------------------------------------------------------------------------------


class Builder:
    """Builds configs and models of one class.

    Attributes:
        model_type: of config.json.
        auto: the class, or Auto class, that loads such folders.
        sight: what its models are given beside token ids, where they have towers.
    """

    sight: Sight | None = None

    def __init__(self, config: Any, auto: Any = None) -> None:
        self.config_class = type(config)
        self.model_type: str = config.model_type
        self.auto = auto or _auto_class(config)

    def config(self, values: Mapping[str, Any]) -> Any:
        """A config object; raises whatever the class objects to."""
        whole = _with_sections(copy.deepcopy(dict(values)))
        config = self.config_class.from_dict(_with_factors(whole))
        if config.architectures is None:
            config.architectures = []  # an Auto class with several for a type goes through them
        return config

    def build(self, values: Mapping[str, Any], device: str = "cpu") -> nn.Module:
        """A model with random weights in float32, with the plainest kernels."""
        config = self.config(values)
        config._attn_implementation = "eager"
        with torch.device(device):
            model = self.auto.from_config(config, dtype=torch.float32)
        plain_kernels(model)
        result: nn.Module = model.eval()
        if self.sight is not None and device == "cpu":
            open_eyes(result, self.sight)
        return result

    def shapes(self, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the module's state, on the meta device where the class can be built there."""
        try:
            model = self.build(values, "meta")
        except Exception:  # some constructors compute with the numbers
            with _Bounded():
                model = self.build(values)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _with_factors(values: Values) -> Values:
    """Widths for which the class has a factor of another size, as that factor."""
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for name in [n for n in part if isinstance(n, str) and factor_fields(n)]:
            width, fields = part.pop(name), factor_fields(name)
            if fields is not None and isinstance(width, int):
                part |= factor_stated(name, width, part[fields[1]])
    return values


def _with_sections(values: Values) -> Values:
    """The sections of rotary angles (for time, height and width) as wide together as the heads of
    a smaller model want them."""
    for part in (values, *values.values()):
        rotary = part.get("rope_parameters") if isinstance(part, dict) else None
        sections = rotary.get("mrope_section") if isinstance(rotary, dict) else None
        heads = part.get("num_attention_heads") if isinstance(part, dict) else None
        if not (isinstance(rotary, dict) and isinstance(sections, list) and heads):
            continue
        width = part.get("head_dim") or part.get("hidden_size", 0) // heads
        wanted = int(width * (rotary.get("partial_rotary_factor") or 1.0)) // 2
        if wanted and sum(sections) != wanted:
            scaled = [size * wanted // sum(sections) for size in sections]
            scaled[-1] += wanted - sum(scaled)
            rotary["mrope_section"] = scaled
    return values


class _Bounded(TorchDispatchMode):
    """Refuses tensors of more than so many bytes together: no model of full size is made."""

    MOST = 800_000_000

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "empty" in func.name() and args and isinstance(args[0], list | tuple):
            self.made += 4 * prod(size for size in args[0] if isinstance(size, int))
            if self.made > self.MOST:
                raise Underivable(
                    f"The class cannot be built without its numbers, more than {self.MOST} bytes."
                )
        return func(*args, **(kwargs or {}))


def plain_kernels(model: Any) -> None:
    """Experts one after another: grouped products want aligned rows and know few dtypes."""
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError, AttributeError):
            model.set_experts_implementation("eager")


def _auto_class(config: Any) -> Any:
    auto = class_of(config)
    if auto is None:
        raise Underivable(f"transformers has no model class for {config.model_type!r}.")
    return auto


# -- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """How a config counts the layers of its (first) stack.

    Attributes:
        place: path of the part of the config that speaks of them.
        field: name of the number there, or None where the length of a list says it.
        count: how many there are.
        other: names of lists that are as long by chance: not so in the model itself.
        part: of the names of its modules, where a model has two stacks.
        shared: the layers of a model are these ones, again and again.
        alone: the config says nothing else of these layers than their number.
        second: the decoder's stack of an encoder-decoder.
        mates: other fields that have to say the same number.
        sections: fields that count the layers of sections one behind another.
    """

    place: Path
    field: str | None
    count: int
    other: frozenset[str] = frozenset()
    part: str = ""
    alone: bool = False
    shared: bool = False
    second: Layers | None = None
    mates: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()

    @property
    def counter(self) -> Path:
        """Path of the number of layers."""
        return (*self.place, self.field or "")

    def moved(self, values: Mapping[str, Any], sources: Sequence[int]) -> Values:
        """The config whose layers are made of these: what it says of each layer moves along.

        Lists with one entry a layer, dicts keyed by a layer's index, lists of such indices; other
        numbers are left alone.
        """
        inner = leaf(values, self.place)
        changes: dict[Path, Any] = {}
        for name, value in ({} if self.alone else inner).items():
            moved = move_entry(value, self.count, sources)
            if moved is not None and name not in self.other and name != LABELS:
                path = (*self.place, name)
                changes[path] = moved
        for name in (self.field, *self.mates):
            path = (*self.place, name or "")
            if name:
                changes[path] = len(sources)
        sections = move_sections(inner, self.sections, sources)
        changes |= {(*self.place, name): size for name, size in sections.items()}
        return with_values(values, changes)


def text_place(values: Mapping[str, Any]) -> Path:
    """Where a wrapper keeps the config of its language model; empty for a plain one."""
    for name in ("text_config", "llm_config", "language_config", "global_config"):
        if isinstance(values.get(name), Mapping):
            return (name,)
    return ()


_TOWER = re.compile(r"(vision|visual|audio|image|speech|vq)\w*_config")


def towers_beside(values: Mapping[str, Any]) -> frozenset[str]:
    """Sections for towers in a config whose own fields speak of the language model."""
    flat = not text_place(values)
    return frozenset(
        name
        for name, part in values.items()
        if flat and isinstance(part, Mapping) and _TOWER.fullmatch(name)
    )


def find_layers(builder: Builder, values: Mapping[str, Any]) -> Layers:
    """Which field counts the layers, as the class itself calls it; of both stacks, where there are
    an encoder and a decoder."""
    if two := _two_stacks(values):
        return two
    place = text_place(values)
    inner = leaf(values, place)
    config = builder.config(values)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = [text.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    names += ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"]
    counts = {n: v for n in names if isinstance(v := inner.get(n), int) and v > 0}
    stages = inner.get("depths")
    if isinstance(stages, list) and set(counts.values()) <= {len(stages)}:
        raise Underivable(
            f"Its layers stand in {len(stages)} stages of widths of their own (depths), of which "
            "no growth is derived."
        )
    for name, value in counts.items():
        if len(counts) == 1 or _counts(builder, values, (*place, name)):
            groups = inner.get("num_hidden_groups")
            if isinstance(groups, int) and groups < value:
                return Layers(place, "num_hidden_groups", groups, shared=True)
            # Of several transformers one behind another: the stack that is called like its section.
            part = "global" if place == ("global_config",) else ""
            return _with_mates(builder, values, Layers(place, name, value, part=part))
    for name, value in inner.items():
        words = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if re.search("layer|block", name) and words and value:
            return Layers(place, None, len(value))
    raise Underivable("No field of the config counts its layers.")


def _with_mates(builder: Builder, values: Mapping[str, Any], layers: Layers) -> Layers:
    """The field by which the class makes its layers: one that has to be changed together with
    another of the same number, or (where the first counts more than the layers, as steps of a loop
    over them) another one alone, or one that is the sum of others, which count sections."""
    inner = leaf(values, layers.place)
    few = range(min(2, layers.count))

    def makes(changed: Layers, sources: Sequence[int] = few) -> bool:
        try:
            names = list(builder.shapes(changed.moved(values, sources)))
        except Exception:  # a refusal of the class
            return False
        return stack_prefix(names, len(sources)) is not None

    if makes(layers):
        return layers
    others = {
        name: value
        for name, value in inner.items()
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value <= layers.count
        if name != layers.field and re.search("layer|block", name)
    }
    for name, value in others.items():
        together = replace(layers, mates=(name,))
        if value == layers.count and makes(together):
            return together
    for name, value in others.items():
        alone = Layers(layers.place, name, value)
        if value < layers.count and layers.count % value == 0 and makes(alone):
            return alone
    for number in (2, 3):
        for names in combinations(others, number):
            sizes = [others[name] for name in names]
            parts = replace(layers, sections=names)
            if sum(sizes) == layers.count and makes(parts, [sum(sizes[:n]) for n in range(number)]):
                return parts
    return layers


def _two_stacks(values: Mapping[str, Any]) -> Layers | None:
    """Encoder and decoder of a config that speaks of both."""
    if not values.get("is_encoder_decoder"):
        return None
    parts = ("encoder",), ("decoder",)
    field = "num_hidden_layers"
    if all(isinstance(leaf(values, (*part, field)), int) for part in parts):
        first, second = (Layers(p, field, leaf(values, (*p, field)), part=p[0]) for p in parts)
        return replace(first, second=second)
    found: list[Layers] = []
    for part, names in (
        ("encoder", ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")),
        ("decoder", ("decoder_layers", "num_decoder_layers")),
    ):
        name = next((n for n in names if isinstance(values.get(n), int)), None)
        if name is None:
            return None
        found.append(Layers((), name, values[name], part=part, alone=bool(found)))
    return replace(found[0], second=found[1])


def _counts(builder: Builder, values: Mapping[str, Any], path: Path) -> bool:
    """The class has more tensors with a larger number there (a decoder alone has no encoder's)."""
    try:
        few, more = (builder.shapes(with_values(values, {path: size})) for size in (2, 3))
    except Exception:  # a refusal of the class
        return True
    return few != more


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def stack_prefix(names: Sequence[str], count: int, part: str = "") -> str | None:
    """What stands in front of the layer's number: the outermost list of ``count`` modules.

    ``part``: a word of the name.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            found.setdefault(name[: match.start()], set()).add(int(match.group()))
    exact = [
        prefix
        for prefix, numbers in found.items()
        if numbers == set(range(count)) and part in prefix
    ]
    text = [prefix for prefix in exact if not re.search("vision|visual|audio|image", prefix)]
    return min(text or exact, key=lambda prefix: (prefix.count("."), prefix), default=None)


def layer_kinds(
    shapes: Shapes, layers: Layers, values: Mapping[str, Any]
) -> list[tuple[Any, ...]] | None:
    """What every layer is: its tensors and shapes, and what the config's lists say of it."""
    prefix = stack_prefix(list(shapes), layers.count, layers.part)
    if prefix is None:
        return None
    inside: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(layers.count)]
    for name, shape in shapes.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            if number.isdigit() and int(number) < layers.count:
                inside[int(number)].append((rest, shape))
    entries = [
        value
        for value in leaf(values, layers.place).values()
        if isinstance(value, list)
        and len(value) == layers.count
        and all(isinstance(entry, str | int | float | bool) for entry in value)
        and len(set(value)) <= 4
    ]
    if layers.sections:
        sizes = [leaf(values, layers.place)[name] for name in layers.sections]
        entries.append([number for number, size in enumerate(sizes) for _ in range(size)])
    return [
        (tuple(sorted(tensors)), *(str(entry[layer]) for entry in entries))
        for layer, tensors in enumerate(inside)
    ]


def _counters(layers: Layers) -> list[Path]:
    """Paths of the numbers of layers."""
    return [layers.counter, *([layers.second.counter] if layers.second else [])]


def _shortest(kinds: Sequence[Any]) -> int:
    """Layers of the shortest beginning with every kind."""
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _repeats(builder: Builder, values: Values, layers: Layers, kinds: Sequence[Any]) -> bool:
    """Twice as many layers are the same kinds twice: lists move along, or a whole period ends."""
    longer = layers.moved(values, [*range(layers.count)] * 2)
    doubled = replace(layers, count=2 * layers.count)
    try:
        found = layer_kinds(builder.shapes(longer), doubled, longer)
    except Exception:  # a refusal of the class
        return False
    return found is not None and [k[0] for k in found] == 2 * [k[0] for k in kinds]


def _one_of_each(
    builder: Builder,
    values: Values,
    layers: Layers,
    kinds: Sequence[Any],
    unrelated: frozenset[str],
) -> tuple[Values, Layers] | None:
    """The first layer of every kind alone, where the config can say so."""
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) < 2:
        return None
    short = layers.moved(values, chosen)
    fewer = replace(layers, count=len(chosen), other=unrelated)
    try:
        found = layer_kinds(builder.shapes(short), fewer, short)
    except Exception:  # a refusal of the class
        return None
    alike = found is not None and [kind[0] for kind in found] == [kinds[i][0] for i in chosen]
    return (short, fewer) if alike and _repeats(builder, short, fewer, found or []) else None


def _few_layers(
    builder: Builder, values: Values, layers: Layers, held: Collection[Path] = ()
) -> tuple[Values, Layers]:
    """The first layers that have every kind, at least two; fields of ``held`` stay as they are."""
    kinds = layer_kinds(builder.shapes(values), layers, values)
    if kinds is None:
        raise Underivable("The class has no list of as many layers as the config says.")
    wanted, needed = set(kinds), _shortest(kinds)
    entries = leaf(values, layers.place).items()
    unrelated = frozenset(
        name
        for name, value in entries
        if isinstance(value, list) and move_entry(value, layers.count, range(layers.count)) is None
    )
    if needed > 4:  # a count of leading layers of one kind, or a period, may be smaller
        for path, value in integers(values):
            if not 1 < value <= layers.count or path in (*_counters(layers), *held):
                continue
            for smaller in (1, 2):
                tried = with_values(values, {path: smaller})
                try:
                    other = layer_kinds(builder.shapes(tried), layers, tried)
                except Exception:
                    continue
                if other and set(other) == wanted and _shortest(other) < needed:
                    values, needed = tried, _shortest(other)
                    break
    if needed > 4 and (one_of_each := _one_of_each(builder, values, layers, kinds, unrelated)):
        return one_of_each
    whole: list[tuple[Values, Layers]] = []
    periods = sorted({v for _, v in integers(values) if needed + 6 < v <= MOST_LAYERS})
    for keep in [*range(max(2, needed), needed + 7), *periods]:
        if keep > layers.count:
            break
        short = layers.moved(values, range(keep))
        fewer = replace(layers, count=keep, other=unrelated)
        try:
            found = layer_kinds(builder.shapes(short), fewer, short)
        except Exception:
            continue
        if found and {kind[0] for kind in found} >= {kind[0] for kind in wanted}:
            whole.append((short, fewer))
            if len(set(found)) == 1 or _repeats(builder, short, fewer, found):
                return short, fewer
    if whole:
        return whole[0]
    if layers.count <= MOST_LAYERS:
        return values, layers
    raise Underivable(f"No small number of layers has every kind of layer of the {layers.count}.")


# -- sizes ----------------------------------------------------------------------------------------

# Field name -> value to try first.
_SMALL: tuple[tuple[str, int], ...] = (
    (r".*vocab.*size.*|n_vocab|vocab", 160),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width", 64),
    (r"embedding_size|attention_hidden_size|(in|out)put_embedding_size", 64),
    (r".*(attention_heads|n_heads?|num_heads|query_groups)", 4),
    (r".*(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads)", 2),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dff|d_inner|dim_ff|d_ff).*", 96),
    (r".*\*.*", 96),  # a factor times another size
    (r".*(moe|expert).*(intermediate|ffn_hidden|hidden).*(size|dim)", 48),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r".*(per_tok(en)?|top_?k(_experts)?|moe_k)", 2),
    (r"zero_expert_num", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r".*lora_rank|time_step_rank|mamba_dt_rank", 24),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"(mamba_)?n_groups", 2),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"mamba_d_ssm", 128),
    (r"max_source_positions", 24),
)
_IDS = r".*(bos|eos|pad|mask|sep|cls|unk|start|begin|end|image|video|audio|eod).*(_id|index)"
_HEADS = r"num_attention_heads|n_heads?|num_heads|attention_heads"
_KV_HEADS = r".*(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads)"
_HIDDEN = r"hidden_size|d_model|n_embd|emb_dim|embedding_dim"
_DEPTH = r"num_hidden_layers|(num|n)_(encoder_)?layers?|encoder_layers|depth|num_blocks"


def _proposals(values: Mapping[str, Any]) -> dict[Path, Any]:
    """What names of fields suggest."""
    found = _by_name(values)
    text, beside = text_place(values), towers_beside(values)
    for path, value in integers(values):
        tower = bool(text) and len(path) > 1 and path[: len(text)] != text
        tower = tower or path[0] in beside
        if tower and value > 2 and re.fullmatch(_DEPTH, path[-1]):
            found |= _first_two(leaf(values, path[:-1]), path)  # no layer of a tower is looked at
        if value > 3 and re.fullmatch(_IDS, path[-1]):
            kinds = ("image", "video", "audio")
            found[path] = next((n for n, kind in enumerate(kinds, 4) if kind in path[-1]), 3)
        if path[-1] in ("image_size", "img_size") and not text:
            patch = leaf(values, (*path[:-1], "patch_size"))
            found[path] = min(value, 2 * patch if isinstance(patch, int) else 32)
        if path[-1] == "max_length" and "num_mel_bins" in values:
            found[path] = min(value, 48)
    for path in [p for p in found if re.fullmatch(r"embedding_size|word_embed_proj_dim", p[-1])]:
        part = leaf(values, path[:-1])
        if all(part.get(name) != part[path[-1]] for name in ("hidden_size", "d_model")):
            found[path] = 32  # the embedding has a projection of its own
    for name, value in values.items():
        if name in ("conv_dim", "tdnn_dim") and isinstance(value, list):
            found[name,] = [min(size, 32) for size in value]
    return found


def _by_name(values: Mapping[str, Any]) -> dict[Path, Any]:
    """Smaller sizes that the names of fields suggest."""
    found: dict[Path, Any] = {}
    for path, value in integers(values):
        for pattern, small in _SMALL:
            if value > small and re.fullmatch(pattern, path[-1]):
                found[path] = small
    for path in found:
        if path[-1] == "attention_hidden_size":  # of what is read beside one another
            found[path] *= max(1, leaf(values, path) // (values.get("hidden_size") or 1))
    heads = {leaf(values, path) for path in found if re.fullmatch(_HEADS, path[-1])}
    for path in found:
        if re.fullmatch(_KV_HEADS, path[-1]) and leaf(values, path) in heads:
            found[path] = 4  # as many as query heads
    return found


def _first_two(part: Mapping[str, Any], counter: Path) -> dict[Path, Any]:
    """Two layers of a tower, and what its config says of each."""
    found: dict[Path, Any] = {counter: 2}
    for name, value in part.items():
        each = isinstance(value, list | Mapping) and not is_index_list(value, part[counter[-1]])
        if each and name != LABELS:
            moved = move_entry(value, part[counter[-1]], range(2))
            found |= {} if moved is None else {(*counter[:-1], name): moved}
    return found


def _said_again(values: Mapping[str, Any], sizes: Mapping[Path, Any]) -> dict[Path, Any]:
    """Widths that a config says twice (a hidden size, and of an adapter behind it), which a class
    may want to agree, and numbers that it says of single layers, made smaller too."""
    found: dict[Path, Any] = {}
    text = text_place(values)
    for hidden in [path for path in sizes if re.fullmatch(_HIDDEN, path[-1])]:
        for path, value in integers(values):
            near = path[:-1] == hidden[:-1] or hidden[:-1] == text
            if near and value == leaf(values, hidden) and path not in sizes:
                found[path] = sizes[hidden]
        part = leaf(values, hidden[:-1])
        heads = next((n for n, v in part.items() if re.fullmatch(_HEADS, n) and type(v) is int), "")
        if heads and part.get("head_dim") == part[hidden[-1]] // max(1, part[heads]):
            fewer = sizes.get((*hidden[:-1], heads), part[heads])
            found |= {(*hidden[:-1], "head_dim"): sizes[hidden] // max(1, fewer)}
    for name, entries in leaf(values, text).items():
        if isinstance(entries, Mapping) and entries and all(map(str.isdigit, entries)):
            for layer, entry in entries.items():
                if isinstance(entry, Mapping):
                    inside = _by_name(entry)
                    found |= {(*text, name, layer, *path): size for path, size in inside.items()}
    return found


def _shared(builder: Builder, values: Values) -> Values:
    """Query heads that share key/value heads, where the class knows that: the general case."""
    for path, value in integers(values):
        if re.fullmatch(_KV_HEADS, path[-1]) and value == 4:
            tried = with_values(values, {path: 2})
            try:
                if builder.shapes(tried) != builder.shapes(values):
                    check_forward(builder.build(tried))
                    return tried
            except Exception:
                continue
    return values


def _strategies(values: Mapping[str, Any]) -> Iterator[dict[Path, Any]]:
    """Sets of smaller sizes; later ones keep more of the ratios between them."""
    proposed = _proposals(values)
    yield proposed
    numbers = dict(integers(values))
    hidden = next((p for p in numbers if re.fullmatch(_HIDDEN, p[-1])), None)
    heads = next((p for p in numbers if re.fullmatch(_HEADS, p[-1])), None)
    if hidden and heads and numbers[heads]:
        each = max(1, numbers[hidden] // numbers[heads])
        fewer = proposed.get(heads, numbers[heads])
        if each * fewer <= 1024:
            yield proposed | {hidden: each * fewer}
            yield proposed | {hidden: each * fewer * 2, heads: 2 * fewer}
    scaling = rf"{_HEADS}|{_HIDDEN}|.*num_key_value_heads|mamba_n_heads|.*d_inner"
    for factor in (4, 8, 16, 32):
        scaled = {p: v // factor for p, v in numbers.items() if re.fullmatch(scaling, p[-1])}
        if all(scaled.values()):
            yield proposed | scaled
    for left in (_HIDDEN, r".*head.*", r".*(expert|group|top|tok).*", r".*(intermed|inner|ffn).*"):
        yield {p: v for p, v in proposed.items() if not re.fullmatch(left, p[-1])}
    yield {p: v for p, v in proposed.items() if re.fullmatch(r".*vocab.*", p[-1])}
    for path in numbers:  # rotary sections of some default configs add up to heads of 128 alone
        if path[-1] == "head_dim" and path[:-1] == text_place(values):
            yield proposed | {path: 128}
    if again := _said_again(values, proposed):
        yield proposed | again
    unset = {}  # a class whose default config is not complete
    for name, value in values.items():
        for pattern, small in _SMALL:
            if value is None and re.fullmatch(pattern, name):
                unset[name,] = small
        if value is None and re.fullmatch(_IDS, name):
            unset[name,] = 1
    yield proposed | unset


def parameters(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def _halved(builder: Builder, values: Values) -> Values:
    """Sizes that names did not tell, halved until the whole is small."""
    total = parameters(builder.shapes(values))
    while total > MOST_PARAMETERS:
        best, smaller = total, None
        for path, value in integers(values):
            if value < 8:
                continue
            tried = with_values(values, {path: value // 2})
            try:
                size = parameters(builder.shapes(tried))
            except Exception:
                continue
            if size < best:
                best, smaller = size, tried
        if smaller is None or best > 0.97 * total:
            if total <= LARGEST:
                break
            raise Underivable(f"The class cannot be made smaller than {total} parameters.")
        values, total = smaller, best
    return values


def vocabulary_of(model: Any) -> int:
    """Tokens that a model knows; of one that reads none, numbers that noise is made by."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return 256


def token_ids(model: Any, seed: int = 0) -> torch.Tensor:
    """Token ids [2, 12] that a model is run on, special ones avoided."""
    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(seed)
    first = min(8, vocabulary // 2)
    return torch.randint(first, vocabulary, TOKENS, generator=generator)


def check_forward(model: Any) -> None:
    """Raise unless the model computes finite logits from its main input alone."""
    with torch.no_grad():
        logits = outputs(model, token_ids(model))
    if not torch.isfinite(logits).all():
        raise Underivable("The logits of a random model are not finite.")


Look = Callable[[Builder, Values, Layers], tuple[Values, Sight | None]]


def make_twin(
    builder: Builder,
    values: Mapping[str, Any],
    keep: Collection[Path] = (),
    look: Look | None = None,
) -> tuple[Values, Layers]:
    """Config values of a twin of the model with these, and how it counts layers.

    Args:
        builder: of its class; is told what the twin can be given to see.
        values: of the model.
        keep: fields that decide what layers are, and stay as they are.
        look: makes the towers of a twin work.

    Raises:
        Underivable: no smaller config is accepted by the class.
    """

    def sighted(small: Values, layers: Layers) -> Values:
        if look is not None:
            small, builder.sight = look(builder, small, layers)
        return small

    builder.sight = None
    layers = find_layers(builder, values)
    tried: list[str] = []
    for sizes in _strategies(values):
        small = with_values(values, sizes)
        try:
            short, fewer = _few_layers(builder, small, layers, keep)
            if layers.second:
                short, second = _few_layers(builder, short, layers.second, keep)
                fewer = replace(fewer, second=second)
            short = _halved(builder, short)
            try:
                check_forward(builder.build(short))
            except Exception:  # a class that has to see something
                short = sighted(short, fewer)
                if builder.sight is None:
                    raise
                return short, fewer
        except Exception as error:  # whatever a class objects to: the next set may do
            tried.append(said_by(error))
            continue
        return sighted(_shared(builder, short), fewer), fewer
    reasons = "; ".join(dict.fromkeys(tried)) or "-"
    if lacking := re.search(r"requires the (\w+) library", reasons):
        raise Underivable(
            f"The class of {builder.model_type!r} needs the package {lacking[1]}, which is not "
            f"installed (pip install {lacking[1]}).",
            f"Install it, and derive again: pip install {lacking[1]}",
        )
    raise Underivable(
        f"{len(tried)} small configs of {builder.model_type!r} were tried, and the class accepts "
        f"none ({reasons[:400]})."
    )
