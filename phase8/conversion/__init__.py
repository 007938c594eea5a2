"""Checkpoints rewritten for other ranks, merged, exported and imported: what tools/reshard_checkpoint.py does."""
