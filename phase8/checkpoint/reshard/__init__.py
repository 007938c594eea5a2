"""Rewriting checkpoints for another layout of ranks, and comparing them."""
