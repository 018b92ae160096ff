"""Ordinary attention as a target: a variant folded into it."""
