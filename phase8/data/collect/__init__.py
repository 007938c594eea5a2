"""Collects training texts from the files that a machine has anyway: Python sources, C headers and sources, documentation."""
