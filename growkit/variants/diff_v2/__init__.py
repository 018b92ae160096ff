"""DIFF V2."""
