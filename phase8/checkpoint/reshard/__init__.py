"""Checkpoints rewritten for another layout of ranks, and compared."""
