"""Number formats of parameters, computation and reductions."""
