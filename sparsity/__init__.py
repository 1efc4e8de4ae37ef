"""What to prune and how: patterns, masks, targets, metrics, calibration, checkpoints."""
