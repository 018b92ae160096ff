"""Token-gated Grouped Differential Attention."""
