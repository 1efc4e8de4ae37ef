"""Checkpoints of other tools: what they pruned is read, and what is pruned here is written for them."""
