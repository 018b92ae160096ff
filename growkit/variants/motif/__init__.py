"""Motif 2.6B and Motif-2-12.7B."""
