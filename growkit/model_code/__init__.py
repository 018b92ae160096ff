"""Model code that is written into folders, and what of transformers it relies on. No torch."""
