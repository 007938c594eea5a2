"""Ablations: variants of the model trained on the same tokens, and their held-out losses compared."""
