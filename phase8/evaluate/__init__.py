"""The loss of a checkpoint on held-out tokens."""
