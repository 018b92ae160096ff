"""Grouped and weighted grouped-query attention in T5's decoder."""
