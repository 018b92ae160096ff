"""The element types of the safetensors format and the numpy types that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One safetensors element type.

    Attributes:
        name: as the file header spells it, e.g. ``"BF16"``.
        bits: stored bits an element; 4 and 6 for the packed types.
        numpy: the numpy type of the same bytes, or None where elements are packed below a byte.
            Packed tensors can be copied but not read as arrays.
        rank: place in the order by which ``safetensors.save_file`` sorts a file (highest first).
    """

    name: str
    bits: int
    numpy: np.dtype[Any] | None
    rank: int

    def nbytes(self, elements: int) -> int | None:
        """Bytes of ``elements`` elements, or None where packed elements do not fill whole bytes."""
        size, remainder = divmod(elements * self.bits, 8)
        return None if remainder else size


# In the order of safetensors 0.8 (crate source, enum `Dtype`; checked against `serialize` in the
# tests). Later versions may append: a name that is not here is refused, never guessed.
_TABLE: tuple[tuple[str, int, Any], ...] = (
    ("BOOL", 8, np.bool_),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, np.uint8),
    ("I8", 8, np.int8),
    ("F8_E5M2", 8, ml_dtypes.float8_e5m2),
    ("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
    ("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu),
    ("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz),
    ("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz),
    ("I16", 16, np.dtype("<i2")),
    ("U16", 16, np.dtype("<u2")),
    ("F16", 16, np.dtype("<f2")),
    ("BF16", 16, ml_dtypes.bfloat16),
    ("I32", 32, np.dtype("<i4")),
    ("U32", 32, np.dtype("<u4")),
    ("F32", 32, np.dtype("<f4")),
    ("C64", 64, np.dtype("<c8")),
    ("F64", 64, np.dtype("<f8")),
    ("I64", 64, np.dtype("<i8")),
    ("U64", 64, np.dtype("<u8")),
)

DTYPES: dict[str, DType] = {
    name: DType(name, bits, None if kind is None else np.dtype(kind), rank)
    for rank, (name, bits, kind) in enumerate(_TABLE)
}
