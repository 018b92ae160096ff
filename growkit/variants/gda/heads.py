# SPDX-License-Identifier: Apache-2.0
"""Head counts of Grouped Differential Attention and the rules they obey. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

NOISE_KEYS = ("own", "shared")


@dataclass(frozen=True)
class GdaHeads:
    """The heads of one GDA layer.

    Attributes:
        n_signal, n_noise: query heads of either kind; one count divides the other.
        n_kv: key/value groups, a divisor of both counts.
        head_dim: width d of one query or key head.
        noise_keys: "own" (DIFF V1, Motif-2: a second key per group, values of width 2d) or
            "shared" (plain form: noise heads read the signal's keys, values of width d).
    """

    n_signal: int
    n_noise: int
    n_kv: int
    head_dim: int
    noise_keys: str

    @classmethod
    def from_fields(
        cls,
        num_attention_heads: int,
        num_noise_heads: int,
        num_key_value_heads: int,
        head_dim: int | None,
        noise_keys: str,
    ) -> GdaHeads:
        """Read the counts from config fields.

        Raises ValueError, naming the fields and what is allowed, for counts that do not fit.
        """
        total, noise, kv = num_attention_heads, num_noise_heads, num_key_value_heads
        if noise_keys not in NOISE_KEYS:
            raise ValueError(f"noise_keys = {noise_keys!r}: it must be one of {NOISE_KEYS}.")
        if head_dim is None or head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim = {head_dim}: a positive even number is required (rotary position "
                "embeddings rotate pairs; it cannot be derived from hidden_size here)."
            )
        if not 0 < noise < total:
            raise ValueError(
                f"num_noise_heads = {noise} with num_attention_heads = {total} (signal + noise): "
                f"num_noise_heads must lie between 1 and {total - 1}."
            )
        signal = total - noise
        if signal % noise and noise % signal:
            fitting = [n for n in range(1, total) if (total - n) % n == 0 or n % (total - n) == 0]
            raise ValueError(
                f"num_noise_heads = {noise} leaves {signal} signal heads of num_attention_heads = "
                f"{total}: one count must divide the other. num_noise_heads that fit: {fitting}."
            )
        keys_per_group = 2 if noise_keys == "own" else 1
        if kv < 1 or kv % keys_per_group:
            raise ValueError(
                f"num_key_value_heads = {kv} with noise_keys = 'own': it counts signal and noise "
                "keys (k1, k2) together and must be a positive even number."
                if keys_per_group == 2
                else f"num_key_value_heads = {kv}: it must be positive."
            )
        n_kv = kv // keys_per_group
        if signal % n_kv or noise % n_kv:
            fewer = min(signal, noise)
            fitting = [keys_per_group * n for n in range(1, fewer + 1) if fewer % n == 0]
            raise ValueError(
                f"num_key_value_heads = {kv} makes {n_kv} key/value groups (noise_keys = "
                f"{noise_keys!r}), which must divide {signal} signal heads and num_noise_heads = "
                f"{noise}. num_key_value_heads that fit: {fitting}."
            )
        return cls(signal, noise, n_kv, head_dim, noise_keys)

    @property
    def ratio(self) -> Fraction:
        """Signal heads per noise head: 3 for 3:1, 1/2 for 1:2."""
        return Fraction(self.n_signal, self.n_noise)

    @property
    def signal_per_group(self) -> int:
        """Signal heads in one stripe of the query heads."""
        return max(1, self.n_signal // self.n_noise)

    @property
    def noise_per_group(self) -> int:
        """Noise heads in one stripe of the query heads, standing after its signal heads."""
        return max(1, self.n_noise // self.n_signal)

    @property
    def keys_per_group(self) -> int:
        """Key heads (and value heads of width d) of one key/value group: k1 and k2, or one."""
        return 2 if self.noise_keys == "own" else 1

    @property
    def value_dim(self) -> int:
        """Width of one head's output: 2d with own noise keys, else d."""
        return self.keys_per_group * self.head_dim
