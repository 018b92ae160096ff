"""Smaller sizes for a config: what the names of its fields suggest, and halving."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from growkit.derive.builder import (
    Builder,
    Path,
    Shapes,
    Underivable,
    Values,
    check_forward,
    integers,
)
from growkit.derive.layer_stacks import text_place, towers_beside
from growkit.families.layer_fields import LABELS, is_index_list, leaf, move_entry, with_values

MOST_PARAMETERS = 4_000_000
LARGEST = 8_000_000  # of a class that cannot be made so small

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


def strategies(values: Mapping[str, Any]) -> Iterator[dict[Path, Any]]:
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


def with_shared_heads(builder: Builder, values: Values) -> Values:
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


def halved(builder: Builder, values: Values) -> Values:
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


def parameters(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(prod(shape) for shape in shapes.values())
