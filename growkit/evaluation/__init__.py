"""Quality of one checkpoint: perplexity on text, and lm-evaluation-harness tasks."""
