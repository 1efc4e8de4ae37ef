"""trisparse: prune, measure, retrain, save."""
