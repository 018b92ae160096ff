"""DIFF V1 as Microsoft's reference module stores it."""
