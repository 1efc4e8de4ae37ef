"""How to win the accuracy back after pruning: parameter groups, LoRA under masks, training loops."""
