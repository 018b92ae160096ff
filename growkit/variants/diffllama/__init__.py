"""DiffLlama, DIFF V1 as transformers has it."""
