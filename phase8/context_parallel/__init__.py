"""Sequences that several ranks share: each holds a slice of consecutive tokens, and what its layers need of earlier ones comes from their ranks."""
