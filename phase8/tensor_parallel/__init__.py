"""Layers whose weights are shared by the ranks of a tensor-parallel group, and the sequence between them."""
