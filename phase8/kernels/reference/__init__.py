"""Plain torch specifications of the operations, written before any fast version."""
