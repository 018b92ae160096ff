"""A checkpoint of which only config.json is at hand: its tensors as the family declares them."""

from __future__ import annotations

from math import prod

from growkit.checkpoint import DTYPES, Checkpoint, TensorInfo, check_unquantised
from growkit.families import family_of

CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def declare_tensors(checkpoint: Checkpoint) -> None:
    """Fill ``checkpoint.tensors`` from the config, so that it can be planned but not read."""
    check_unquantised(checkpoint)
    family = family_of(checkpoint.config)
    sizes = family.sizes(checkpoint.config)
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = CONFIG_DTYPES.get(named, "F32")
    for tensor, _, name in family.names(sizes):
        shape = tensor.shape(sizes)
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
        checkpoint.tensors[name] = TensorInfo(name, dtype, shape, "", 0, nbytes)
        checkpoint.total_size += nbytes
