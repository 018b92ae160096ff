"""The model code in folders of our own model types, and what of transformers it relies on. No torch."""
