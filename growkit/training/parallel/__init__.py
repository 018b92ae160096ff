"""Several processes: how they were started, what they agree on, sharded state."""
