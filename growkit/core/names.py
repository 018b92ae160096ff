"""Names of the files that several rooms read or write. What one room keeps for itself is named
there; the patterns of what --overwrite may replace are in ``checkpoint/side_files.py``."""

from __future__ import annotations

# A checkpoint, as transformers and the Hub have it.
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
README = "README.md"

# What growkit writes beside it.
MANIFEST = "growkit.json"
TRAINING_RECORD = "growkit_training.json"
OPTIMIZER_FOLDER = "growkit_optimizer"

# A run of training and its checkpoints.
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
