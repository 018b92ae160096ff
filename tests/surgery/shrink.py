"""Shrinking by a plan's own maps: what growth did has to be undone byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_checkpoints import Array, Tensors

from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.effect import Fill
from growkit.surgery.plan import Plan


def shrink(plan: Plan, grown: Tensors) -> Tensors:
    """The source's tensors: the first copy of what produces, the sum of what reads.

    Factors are taken off again; inserted layers are dropped after a look at their zeros. Copies of
    an expert have to be equal, or sum to it where they share it.
    """
    result: Tensors = {}
    dtypes = {}
    for tensor in plan.tensors:
        array = grown[tensor.output.name]
        if tensor.action == "zero":
            assert not array.any()
        if tensor.in_new_layer or tensor.source is None:
            continue
        dtype = array.dtype
        wide = array.astype(np.float64)
        # The copies of an expert share their columns each by itself, so columns come first.
        for axis, dim in reversed(list(enumerate(tensor.dims))):
            if dim is not None:
                summed = dim.consumes or (tensor.share is not None and len(tensor.dims) - axis == 3)
                wide = _shrink_axis(wide, axis, replace(dim, consumes=summed))
        if tensor.factor != 1.0:
            wide = (wide + tensor.gain_offset) / tensor.factor - tensor.gain_offset
        if tensor.share is not None and tensor.source in result:
            # Copies of an expert, each in a tensor of its own, that share the weight.
            result[tensor.source] = result[tensor.source] + wide
            continue
        if tensor.source in result:
            # A second reader of one source: the output projection of an untied embedding.
            assert (result[tensor.source] == wide).all()
            continue
        result[tensor.source], dtypes[tensor.source] = wide, dtype
    return {name: wide.astype(dtypes[name]) for name, wide in result.items()}


def _shrink_axis(wide: Array, axis: int, dim: DimMap) -> Array:
    source, block, consumes = dim.source, dim.block, dim.consumes
    zero = dim.new(Fill.ZERO)[::block]
    scale = np.ones(len(source)) if dim.scale is None else dim.scale
    units = np.moveaxis(wide, axis, 0).reshape(len(source), block, -1)
    rest = np.moveaxis(wide, axis, 0).shape[1:]
    old = np.zeros((int(source.max()) + 1, block, units.shape[2]))
    seen: set[int] = set()
    for unit, origin in enumerate(source.tolist()):
        if origin == NEW:
            assert not zero[unit] or not units[unit].any()
        elif consumes:
            old[origin] += units[unit]
        elif origin not in seen:
            old[origin] = units[unit] / scale[unit]
        else:
            assert (old[origin] == units[unit]).all()
        seen.add(origin)
    shrunk: Array = np.moveaxis(old.reshape(-1, *rest), 0, axis)
    return shrunk
