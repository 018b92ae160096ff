"""Shared DIFF Transformer."""
