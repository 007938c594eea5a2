"""Sharding of parameters, gradients and optimizer over data-parallel ranks."""
