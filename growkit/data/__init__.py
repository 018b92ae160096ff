"""The text of a run: sources, held-out split, tokens, packing, order. No torch."""
