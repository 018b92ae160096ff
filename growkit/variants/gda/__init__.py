"""Grouped Differential Attention: signal heads, noise heads, one lambda a layer."""
