"""Tables of families derived from classes of transformers, and proven on twins."""
