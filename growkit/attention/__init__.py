"""Attention variants: one file each, the readable definition (the oracle) beside the fast path."""
