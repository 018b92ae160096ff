"""Fold differential attention whose two maps have queries or keys of their own.

    y = sum_i W_i (A1_i - lambda A2_i) V_i = sum_i W_i A1_i V_i + sum_i (-lambda W_i) A2_i V_i

is linear in the maps, whatever makes them: each map becomes an ordinary head. With keys of their
own (DIFF V1, GDA, Shared DIFF with updates of the keys) values are two heads wide and every pair of
(map, half of the value) is one head, on a key/value head (k1 or k2, v1 or v2); a key of more maps
is repeated until every key/value head serves as many heads. The KV cache grows to
(s + n) / min(s, n) times, for the s signal and n noise heads of a key/value pair: twice at 1:1.
Shared DIFF's updates are multiplied out: W_Q + U D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.families.differential import signal_to_noise
from growkit.families.unit_layout import IntArray
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Array, Computed, ModelShape


@dataclass(frozen=True)
class FoldedHeads:
    """Which heads of the source the heads of the folded model are.

    Attributes:
        head: signal head i, or number of signal heads + noise head j; shape [query heads].
        half: of the value; shape [query heads].
        query: block of head_dim rows of q; shape [query heads].
        key, value: block of head_dim rows of k and v; shape [kv heads].
        pair: key/value pair of each folded kv head; shape [kv heads].
    """

    head: IntArray
    half: IntArray
    query: IntArray
    key: IntArray
    value: IntArray
    pair: IntArray

    @classmethod
    def of(cls, shape: ModelShape) -> FoldedHeads:
        """For GDA and DIFF V1 (queries in stripes) and Shared DIFF (maps adjacent)."""
        sizes = shape.sizes
        adjacent = shape.family.name == "shared_diff"
        signal = sizes["query_head"] if adjacent else sizes["signal_head"]
        noise = sizes["query_head"] if adjacent else sizes["noise_head"]
        pairs, parts = sizes["kv_head"], sizes["parts"]
        per_pair = (signal // pairs, noise // pairs)
        served = min(per_pair)
        heads: list[tuple[int, int, int]] = []
        keys: list[tuple[int, int, int]] = []
        for pair in range(pairs):
            for half in range(parts):
                for which, count in enumerate(per_pair):
                    numbers = pair * count + np.arange(count)
                    rows = 2 * numbers + which if adjacent else stripe_rows(signal, noise, which)
                    rows = rows if adjacent else rows[numbers]
                    heads += [
                        (which * signal + int(n), half, int(row))
                        for n, row in zip(numbers, rows, strict=True)
                    ]
                    if parts == 2:
                        keys += [(2 * pair + which, 2 * pair + half, pair)] * (count // served)
                if parts == 1:
                    keys.append((pair, pair, pair))
        return cls(*np.array(heads).T, *np.array(keys).T)

    def axes(self, shape: ModelShape) -> dict[str, AxisMap]:
        """Axis maps of the folded model's heads where the source has axes of the same name."""
        if shape.family.name != "shared_diff":
            return {}
        heads, pairs = shape.sizes["query_head"], shape.sizes["kv_head"]
        return {
            "query_head": AxisMap(self.head % heads, heads),
            "kv_head": AxisMap(self.pair, pairs),
        }


def stripe_rows(signal: int, noise: int, which: int) -> IntArray:
    """Block of q_proj of every signal head (which = 0) or noise head (1), in stripes."""
    groups = min(signal, noise)
    per_group = (signal // groups, noise // groups)
    group, place = np.divmod(np.arange((signal, noise)[which]), per_group[which])
    rows: IntArray = group * sum(per_group) + which * per_group[0] + place
    return rows


def folded_tensors(
    shape: ModelShape, heads: FoldedHeads, lambda_of: Callable[[Checkpoint, int], float]
) -> dict[str, Computed]:
    """Projections and biases of the folded model.

    Args:
        shape: the differential model; no sub-layer norm, no bias of o.
        heads: of the folded model.
        lambda_of: lambda of a layer.
    """
    blocks = {"q": heads.query, "k": heads.key, "v": heads.value}
    result = {kind: _picked(shape, kind, index) for kind, index in blocks.items()}
    for kind, index in blocks.items():
        if shape.has(f"{kind}_bias"):
            result[f"{kind}_bias"] = _picked_bias(shape, kind, index)
    return result | {"o": _output(shape, heads, lambda_of)}


def _name(shape: ModelShape, role: str, layer: int) -> str:
    tensor = shape.family.tensor(role)
    assert tensor is not None
    return tensor.name.replace("{layer}", str(layer))


def _picked(shape: ModelShape, kind: str, index: IntArray) -> Computed:
    """Blocks of head_dim rows, updates multiplied out."""
    updated = shape.has(f"{kind}_up")

    @lru_cache(maxsize=1)  # blocks of a tensor follow one another
    def whole(checkpoint: Checkpoint, layer: int) -> Array:
        def read(role: str) -> Array:
            return checkpoint.read(_name(shape, role, layer)).astype(np.float64)

        base = read(kind)
        by_head = base.reshape(-1, shape.sizes["head_dim"], base.shape[1])
        if updated:  # [heads, 2, d, r] @ [heads, 2, r, hidden]
            up = read(f"{kind}_up")
            up = up.reshape(len(by_head), 2, -1, up.shape[1])
            down = read(f"{kind}_down").reshape(len(by_head), 2, -1, base.shape[1])
            by_head = (by_head[:, None] + up @ down).reshape(-1, *by_head.shape[1:])
        picked: Array = by_head[index].reshape(-1, base.shape[1])
        return picked

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        return whole(checkpoint, layer)[first : first + count]

    return Computed(rows, (kind, f"{kind}_down", f"{kind}_up") if updated else (kind,))


def _picked_bias(shape: ModelShape, kind: str, index: IntArray) -> Computed:
    """Blocks of head_dim entries; the base's bias is that of both maps."""
    maps = 2 if shape.has(f"{kind}_up") else 1

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        bias = checkpoint.read(_name(shape, f"{kind}_bias", layer)).astype(np.float64)
        by_head = bias.reshape(-1, shape.sizes["head_dim"]).repeat(maps, axis=0)
        picked: Array = by_head[index].reshape(-1, 1)
        return picked[first : first + count]

    return Computed(rows, (f"{kind}_bias",))


def _output(
    shape: ModelShape, heads: FoldedHeads, lambda_of: Callable[[Checkpoint, int], float]
) -> Computed:
    """o [hidden, query heads x head_dim]: W_i, or -lambda times the sum over a noise head's i."""
    sizes = shape.sizes
    adjacent = shape.family.name == "shared_diff"
    if adjacent:
        signal, subtracted = sizes["query_head"], np.arange(sizes["query_head"])[:, None]
    else:
        signal, subtracted = sizes["signal_head"], signal_to_noise(sizes)
    reads = np.zeros((int(subtracted.max()) + 1, signal))  # [noise heads, signal heads]
    np.put_along_axis(reads.T, subtracted, 1.0, axis=1)

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        stored = checkpoint.read_rows(_name(shape, "o", layer), first, count).astype(np.float64)
        block = stored.reshape(count, signal, sizes["parts"], sizes["head_dim"])
        summed = np.einsum("ns,cspd->cnpd", reads, block)
        both = np.concatenate([block, -lambda_of(checkpoint, layer) * summed], axis=1)
        folded: Array = both[:, heads.head, heads.half].reshape(count, -1)
        return folded

    return Computed(rows, ("o",))
