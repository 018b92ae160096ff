"""torch tensors as numpy arrays without a copy."""

from __future__ import annotations

from typing import Any

from growkit.checkpoint import DTYPES
from growkit.errors import CheckpointError
from growkit.optimizer_state.source import RESET, Array

_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}


def dtype_name(dtype: Any, what: str) -> str:
    """safetensors name of a torch dtype that moments may have."""
    name = _NAMES.get(str(dtype))
    if name is None:
        raise CheckpointError(
            f"{what} has dtype {dtype}, and moments are grown in {', '.join(_NAMES.values())}.",
            RESET,
        )
    return name


def as_array(tensor: Any) -> Array:
    """The values of a CPU tensor; bfloat16 through its bits, which numpy itself cannot hold."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        kind = DTYPES["BF16"].numpy
        assert kind is not None
        bits: Array = tensor.contiguous().view(torch.uint16).numpy().view(kind)
        return bits
    array: Array = tensor.numpy()
    return array


def as_tensor(array: Array) -> Any:
    """The other way, without a copy."""
    import torch

    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)
