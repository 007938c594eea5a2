"""Layers whose weights are divided over the ranks of a tensor-parallel group; between layers the ranks divide the tokens."""
