"""A checkpoint of which only config.json is at hand: its tensors as the family declares them."""

from __future__ import annotations

from math import prod

from growkit.checkpoint import DTYPES, Checkpoint, TensorInfo, check_unquantised
from growkit.errors import UsageError
from growkit.families import family_of
from growkit.families.config_fields import MAX_TENSORS

CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def declare_tensors(checkpoint: Checkpoint) -> None:
    """Fill ``checkpoint.tensors`` from the config, so that it can be planned but not read."""
    check_unquantised(checkpoint)
    family = family_of(checkpoint.config)
    sizes = family.sizes(checkpoint.config)
    declared = family.count(sizes)
    if declared > MAX_TENSORS:
        raise UsageError(
            f"config.json declares {declared} tensors.",
            f"growkit plans models with at most {MAX_TENSORS}: check the numbers of layers and "
            "experts.",
        )
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = CONFIG_DTYPES.get(named, "F32")
    for name, shape in family.declared(sizes):
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
        checkpoint.tensors[name] = TensorInfo(name, dtype, shape, "", 0, nbytes)
        checkpoint.total_size += nbytes
