"""Vocabularies of two tokenizers: which row of the embedding each token of the new one takes."""
