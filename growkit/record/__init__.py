"""What is written or shown about a checkpoint and a plan: manifest, cost, card, tables."""
