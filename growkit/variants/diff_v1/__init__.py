"""DIFF Transformer (V1)."""
