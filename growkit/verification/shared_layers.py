"""Layers of B that are layers of A: computed once for one input, instead of once in each model.

Depth growth leaves most layers as they are, and what it puts between them passes the residual
stream on unchanged: the two models then repeat each other's arithmetic. A layer of B (or its output
matrix) takes what a layer of A gave where all of this holds:

* both have the same class, the same weights and buffers, bit for bit, the same settings, and the
  same entry in every list that the two configs hold by layer: what was written is what was there;
* on an earlier window, which both computed, they were given the same bits and gave the same bits:
  nothing that no comparison of weights sees (the number of a layer) tells them apart;
* now, too, they are given the same bits, masks and rotary angles included.

All else is computed, so the figures are those of two whole passes. Layers with experts are left
out: ties between those are decided during B's pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from growkit.verification.layers import layer_stacks
from growkit.verification.model_inputs import text_config
from growkit.verification.routing import routers

# Where a layer stands. Growth moves layers; whether that changes one, a window shows.
PLACES = frozenset(("layer_idx", "layer_id", "layer_number"))
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedLayers:
    """What two loaded models of one stack of layers have in common; nothing in others.

    Attributes:
        proven: layers of B that a window has shown to be layers of A.
    """

    def __init__(self, models: tuple[Any, Any] | None = None) -> None:
        """``models``: A and B; None for nothing in common."""
        self.proven: set[nn.Module] = set()
        self._of_a: dict[nn.Module, nn.Module] = {}  # layer of B -> layer of A
        self._heads: dict[nn.Module, nn.Module] = {}  # the same of the output matrices
        self._trusted: set[nn.Module] = set()  # of B: proven layers and the output matrix
        self._records: dict[nn.Module, tuple[Any, Any]] = {}  # of the first pass: given, gave
        if models is None or any(map(routers, models)):
            return
        stacks = [layer_stacks(model) for model in models]
        if any(stack.keys() != {""} for stack in stacks):
            return
        layers_a, layers_b = (list(stack[""]) for stack in stacks)
        configs = [text_config(model).to_dict() for model in models]
        candidates: dict[Any, list[int]] = {}
        for i, layer in enumerate(layers_a):
            candidates.setdefault(_sample(layer), []).append(i)
        for j, layer in enumerate(layers_b):
            for i in candidates.get(_sample(layer), ()):
                entries = [_entries(configs[0], i, layers_a), _entries(configs[1], j, layers_b)]
                if entries[0] == entries[1] and _same(layers_a[i], layer):
                    self._of_a[layer] = layers_a[i]
                    break
        heads: list[Any] = [getattr(m, "get_output_embeddings", lambda: None)() for m in models]
        if self._of_a and None not in heads and _same(*heads):
            self._heads = {heads[1]: heads[0]}

    @contextlib.contextmanager
    def pass_of(self, folder: str, *, first: bool) -> Iterator[None]:
        """Open for one pass of ``a`` or ``b``: the ``first`` of two over the same tokens is
        recorded, and the other takes from the record."""
        if first:
            self._records.clear()
        replaced: set[nn.Module] = set()
        for layer_b, layer_a in (self._of_a | self._heads).items():
            own, other = (layer_a, layer_b) if folder == "a" else (layer_b, layer_a)
            if own in replaced:  # two layers of B are the same one of A
                continue
            replaced.add(own)
            made = self._recording(own) if first else self._taking(own, other, layer_b)
            own.forward = made
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _recording(self, layer: nn.Module) -> Any:
        forward = layer.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            given = _copied((args, kwargs))  # what follows may change them in place
            gave = forward(*args, **kwargs)
            self._records[layer] = given, _copied(gave)
            return gave

        return record

    def _taking(self, layer: nn.Module, other: nn.Module, layer_b: nn.Module) -> Any:
        forward = layer.forward

        def take(*args: Any, **kwargs: Any) -> Any:
            given, gave = self._records.get(other, (None, None))
            same = given is not None and _equal(given, (args, kwargs))
            if same and layer_b in self._trusted:
                return _copied(gave)
            found = forward(*args, **kwargs)
            if same and _equal(gave, found):
                self._trusted.add(layer_b)
                if layer_b in self._of_a:
                    self.proven.add(layer_b)
            return found

        return take


def _sample(layer: nn.Module) -> Any:
    """A few weights of a layer: layers of which these differ are not compared any further."""
    first = (
        (name, p.shape, p.dtype, tuple(p.flatten()[:4].tolist())) for name, p in _tensors(layer)
    )
    return type(layer), tuple(first)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _entries(config: Mapping[str, Any], layer: int, layers: list[nn.Module]) -> dict[str, Any]:
    """What a config says of one layer, in its lists of as many entries as there are layers."""
    lists = {n: v for n, v in config.items() if isinstance(v, list) and len(v) == len(layers)}
    return {name: value[layer] for name, value in lists.items()}


def _same(a: Any, b: Any) -> bool:
    """The same classes, settings and bits of weights and buffers."""
    modules = list(a.named_modules()), list(b.named_modules())
    tensors = list(_tensors(a)), list(_tensors(b))
    if any(len(left) != len(right) for left, right in (modules, tensors)):
        return False
    for (name_a, left), (name_b, right) in zip(*modules, strict=True):
        if name_a != name_b or type(left) is not type(right) or _settings(left) != _settings(right):
            return False
    pairs = zip(*tensors, strict=True)
    return all(name_a == name_b and _same_bits(x, y) for (name_a, x), (name_b, y) in pairs)


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in PLACES and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | FunctionType)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = INTEGERS.get(a.element_size())
    if kind is None or not a.dim() or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return torch.equal(a.view(kind), b.view(kind))


def _copied(value: Any) -> Any:
    """Arguments or results of a layer, of tensors that nobody else has."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {name: _copied(entry) for name, entry in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    """The same bits, or the same plain values; objects of other kinds (caches) are never equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return _same_bits(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if type(a) is dict:
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    return _is_plain(a) and bool(a == b)
