"""Growth in memory, straight from the algebra: reshapes and repeats, no axis maps.

A checkpoint becomes one object in which every head has an axis of its own; each operator is a
function on it, with even shares. ``fold_*`` go the other way and *sum* the copies of a reader: so
the random shares of ``split`` are checked. Sizes: E hidden, F FFN, d head_dim, w value width, n_S
signal (or ordinary query) heads, n_N noise heads, n_kv key/value pairs of P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tiny_checkpoints import Array, Config, Tensors

VECTORS = (
    *(f"self_attn.lambda_{v}" for v in ("q1", "k1", "q2", "k2")),
    "self_attn.subln.weight",
    "mlp.act_fn.weight",
    "mlp.act_fn.bias",
)
# Bias name -> the matrix whose rows it belongs to.
BIASES = {
    "self_attn.q_proj.bias": "qs",
    "self_attn.k_proj.bias": "k",
    "self_attn.v_proj.bias": "v",
    "self_attn.o_proj.bias": "o",
    "mlp.gate_proj.bias": "gate",
    "mlp.up_proj.bias": "up",
    "mlp.down_proj.bias": "down",
}


@dataclass
class Layer:
    """qs [n_S, d, E], qn [n_N, d, E], k and v [n_kv, P, d, E], o [E, n_S, w], gate and up [F, E],
    down [E, F], norms [2, E]; vectors that no operator touches; biases that no operator touches."""

    qs: Array
    qn: Array
    k: Array
    v: Array
    o: Array
    gate: Array
    up: Array
    down: Array
    norms: Array
    vectors: dict[str, Array] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)


@dataclass
class Model:
    """embed [V, E], final_norm [E], lm_head [V, E] or None, layers."""

    embed: Array
    final_norm: Array
    lm_head: Array | None
    layers: list[Layer]

    def each(self, change: Callable[[Layer], Layer]) -> Model:
        return replace(self, layers=[change(layer) for layer in self.layers])


# -- folders to models and back -----------------------------------------------------------------


def _counts(config: Config) -> tuple[int, int, int, int]:
    """(n_S, n_N, n_kv, P)."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    if config["model_type"] == "llama":
        return heads, 0, kv, 1
    noise = config.get("num_noise_heads", heads // 2)
    parts = 1 if config.get("noise_keys") == "shared" else 2
    return heads - noise, noise, kv // parts, parts


def load(config: Config, tensors: Tensors) -> Model:
    """Give every head of a checkpoint an axis of its own."""
    signal, noise, kv, parts = _counts(config)
    d, E = config["head_dim"], config["hidden_size"]
    halves = config["model_type"] == "diffllama"

    def heads(rows: Array) -> tuple[Array, Array]:
        rows = rows.reshape(signal + noise, d, E)
        if not noise or halves:
            return rows[:signal], rows[signal:]
        groups = min(signal, noise)
        striped = rows.reshape(groups, -1, d, E)
        cut = signal // groups
        return striped[:, :cut].reshape(signal, d, E), striped[:, cut:].reshape(noise, d, E)

    def pairs(rows: Array) -> Array:
        if halves:
            return rows.reshape(parts, kv, d, E).swapaxes(0, 1)
        return rows.reshape(kv, parts, d, E)

    layers = []
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        qs, qn = heads(tensors[at + "self_attn.q_proj.weight"])
        norms = (tensors[at + f"{n}_layernorm.weight"] for n in ("input", "post_attention"))
        layers.append(
            Layer(
                qs,
                qn,
                pairs(tensors[at + "self_attn.k_proj.weight"]),
                pairs(tensors[at + "self_attn.v_proj.weight"]),
                tensors[at + "self_attn.o_proj.weight"].reshape(E, signal, -1),
                *(tensors[at + f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")),
                np.stack(list(norms)),
                {n: tensors[at + n] for n in VECTORS if at + n in tensors},
                {n: tensors[at + n] for n in BIASES if at + n in tensors},
            )
        )
    return Model(
        tensors["model.embed_tokens.weight"],
        tensors["model.norm.weight"],
        tensors.get("lm_head.weight"),
        layers,
    )


def store(model: Model, *, halves: bool = False) -> Tensors:
    """The tensors of a checkpoint; query heads in stripes, or in halves as DiffLlama has them."""
    E = model.embed.shape[1]
    result = {"model.embed_tokens.weight": model.embed}
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        signal, noise = len(layer.qs), len(layer.qn)
        if not noise:
            q = layer.qs
        elif halves:
            q = np.concatenate([layer.qs, layer.qn])
        else:
            groups = min(signal, noise)
            d = layer.qs.shape[1]
            parts = [h.reshape(groups, -1, d, E) for h in (layer.qs, layer.qn)]
            q = np.concatenate(parts, axis=1)
        k, v = ((t.swapaxes(0, 1) if halves else t) for t in (layer.k, layer.v))
        result |= {
            at + "self_attn.q_proj.weight": q.reshape(-1, E),
            at + "self_attn.k_proj.weight": k.reshape(-1, E),
            at + "self_attn.v_proj.weight": v.reshape(-1, E),
            at + "self_attn.o_proj.weight": layer.o.reshape(E, -1),
            at + "mlp.gate_proj.weight": layer.gate,
            at + "mlp.up_proj.weight": layer.up,
            at + "mlp.down_proj.weight": layer.down,
            at + "input_layernorm.weight": layer.norms[0],
            at + "post_attention_layernorm.weight": layer.norms[1],
        }
        result |= {at + name: value for name, value in (layer.vectors | layer.biases).items()}
    result["model.norm.weight"] = model.final_norm
    if model.lm_head is not None:
        result["lm_head.weight"] = model.lm_head
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


# -- growth with even shares --------------------------------------------------------------------


def _divide(weights: Array, copies: int) -> Array:
    wide = weights.astype(np.float64 if weights.dtype == np.float64 else np.float32)
    return (wide / wide.dtype.type(copies)).astype(weights.dtype)


def signal(model: Model, copies: int) -> Model:
    """growth.md 2: every signal head beside itself, o columns shared."""
    return model.each(
        lambda layer: replace(
            layer,
            qs=np.repeat(layer.qs, copies, axis=0),
            o=np.repeat(_divide(layer.o, copies), copies, axis=1),
        )
    )


def noise(model: Model, copies: int) -> Model:
    """growth.md 2: every group cut into ``copies`` groups with a copy of its noise head."""
    return model.each(lambda layer: replace(layer, qn=np.repeat(layer.qn, copies, axis=0)))


def uniform(model: Model, copies: int) -> Model:
    """growth.md 2: whole groups beside themselves, kv fixed."""

    def change(layer: Layer) -> Layer:
        groups = min(len(layer.qs), len(layer.qn))

        def whole(array: Array, axis: int) -> Array:
            cut = [*array.shape[:axis], groups, -1, *array.shape[axis + 1 :]]
            grown = np.repeat(array.reshape(cut), copies, axis=axis)
            return grown.reshape([*array.shape[:axis], -1, *array.shape[axis + 1 :]])

        return replace(
            layer,
            qs=whole(layer.qs, 0),
            qn=whole(layer.qn, 0),
            o=whole(_divide(layer.o, copies), 1),
        )

    return model.each(change)


def ffn(model: Model, copies: int) -> Model:
    """growth.md 3: the whole width again, down columns shared."""
    return model.each(
        lambda layer: replace(
            layer,
            gate=np.tile(layer.gate, (copies, 1)),
            up=np.tile(layer.up, (copies, 1)),
            down=np.tile(_divide(layer.down, copies), (1, copies)),
            biases={
                n: np.tile(b, copies) if BIASES[n] in ("gate", "up") else b
                for n, b in layer.biases.items()
            },
        )
    )


def hidden(model: Model, copies: int) -> Model:
    """growth.md 4a: the residual stream [x, x, ...]; a tied head puts 1 / n on the final norm."""

    def reads(array: Array) -> Array:
        return np.concatenate([_divide(array, copies)] * copies, axis=-1)

    def change(layer: Layer) -> Layer:
        read = {n: reads(getattr(layer, n)) for n in ("qs", "qn", "k", "v", "gate", "up")}
        return replace(
            layer,
            **read,
            o=np.concatenate([layer.o] * copies),
            down=np.concatenate([layer.down] * copies),
            norms=np.tile(layer.norms, (1, copies)),
            biases={
                n: np.tile(b, copies) if BIASES[n] in ("o", "down") else b
                for n, b in layer.biases.items()
            },
        )

    final = np.tile(model.final_norm, copies)
    tied = model.lm_head is None
    return replace(
        model.each(change),
        embed=np.tile(model.embed, (1, copies)),
        final_norm=_divide(final, copies) if tied else final,
        lm_head=None if tied else reads(model.lm_head),
    )


def depth(model: Model, after: list[int]) -> Model:
    """growth.md 6: copies that write zero, after the given layers."""
    layers = []
    for i, layer in enumerate(model.layers):
        silent = {n: np.zeros_like(b) for n, b in layer.biases.items() if BIASES[n] in "o down"}
        block = replace(
            layer,
            o=np.zeros_like(layer.o),
            down=np.zeros_like(layer.down),
            biases=layer.biases | silent,
        )
        layers += [layer] + [block] * after.count(i)
    return replace(model, layers=layers)


def untie(model: Model, copies: int = 1) -> Model:
    return replace(model, lm_head=model.embed)


# -- folding back: first copy of what produces, sum of what reads ---------------------------------


def _same(array: Array, axis: int) -> Array:
    """The first copy along ``axis``; all have to be equal."""
    first: Array = np.take(array, [0], axis)
    assert (array == first).all(), "copies of a producer differ"
    return first.squeeze(axis)


def _sum(array: Array, axis: int) -> Array:
    wide = array.astype(np.float64)
    summed = wide.sum(axis)
    assert (np.take(wide, 0, axis) != np.take(wide, 1, axis)).mean() > 0.8, "copies do not differ"
    return summed


def _cut(array: Array, axis: int, *sizes: int) -> Array:
    return array.reshape([*array.shape[:axis], *sizes, *array.shape[axis + 1 :]])


def fold_signal(model: Model, copies: int) -> Model:
    return model.each(
        lambda layer: replace(
            layer,
            qs=_same(_cut(layer.qs, 0, -1, copies), 1),
            o=_sum(_cut(layer.o, 1, -1, copies), 2),
        )
    )


def fold_noise(model: Model, copies: int) -> Model:
    return model.each(lambda layer: replace(layer, qn=_same(_cut(layer.qn, 0, -1, copies), 1)))


def fold_uniform(model: Model, copies: int) -> Model:
    def change(layer: Layer) -> Layer:
        groups = min(len(layer.qs), len(layer.qn)) // copies

        def merged(array: Array, axis: int, join: Callable[[Array, int], Array]) -> Array:
            joined = join(
                _cut(array, axis, groups, copies, array.shape[axis] // groups // copies), axis + 1
            )
            return joined.reshape([*array.shape[:axis], -1, *array.shape[axis + 1 :]])

        return replace(
            layer,
            qs=merged(layer.qs, 0, _same),
            qn=merged(layer.qn, 0, _same),
            o=merged(layer.o, 1, _sum),
        )

    return model.each(change)


def fold_ffn(model: Model, copies: int) -> Model:
    return model.each(
        lambda layer: replace(
            layer,
            gate=_same(_cut(layer.gate, 0, copies, -1), 0),
            up=_same(_cut(layer.up, 0, copies, -1), 0),
            down=_sum(_cut(layer.down, 1, copies, -1), 1),
            biases={
                n: _same(_cut(b, 0, copies, -1), 0) if BIASES[n] in ("gate", "up") else b
                for n, b in layer.biases.items()
            },
        )
    )


def fold_hidden(model: Model, copies: int) -> Model:
    def change(layer: Layer) -> Layer:
        read: dict[str, Any] = {}
        for name in ("qs", "qn", "k", "v", "gate", "up"):
            array = getattr(layer, name)
            if array.size:
                read[name] = _sum(_cut(array, array.ndim - 1, copies, -1), array.ndim - 1)
        return replace(
            layer,
            **read,
            o=_same(_cut(layer.o, 0, copies, -1), 0),
            down=_same(_cut(layer.down, 0, copies, -1), 0),
            norms=_same(_cut(layer.norms, 1, copies, -1), 1),
            biases={
                n: _same(_cut(b, 0, copies, -1), 0) if BIASES[n] in ("o", "down") else b
                for n, b in layer.biases.items()
            },
        )

    final = _same(_cut(model.final_norm, 0, copies, -1), 0)
    tied = model.lm_head is None
    return replace(
        model.each(change),
        embed=_same(_cut(model.embed, 1, copies, -1), 1),
        final_norm=(final.astype(np.float64) * copies) if tied else final,
        lm_head=None if tied else _sum(_cut(model.lm_head, 1, copies, -1), 1),
    )


def fold_depth(model: Model, after: list[int]) -> Model:
    kept = []
    position = 0
    for i in range(len(model.layers) - len(after)):
        kept.append(model.layers[position])
        for block in model.layers[position + 1 : position + 1 + after.count(i)]:
            assert not block.o.any() and not block.down.any()
        position += 1 + after.count(i)
    return replace(model, layers=kept)


def fold_untie(model: Model, copies: int = 1) -> Model:
    assert model.lm_head is not None and (model.lm_head == model.embed).all()
    return replace(model, lm_head=None)
