"""Families as data: tables made of classes of transformers, proved, and read without torch."""
