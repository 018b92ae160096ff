"""Attention variants, a folder each: attention (torch), family table and conversion."""
