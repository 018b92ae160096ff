"""Weighted grouped-query attention."""
