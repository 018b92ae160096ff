"""Simulated attention scores (SAS) with PEAA."""
