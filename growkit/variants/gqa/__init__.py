"""Grouped-query, multi-head and multi-query attention."""
