"""Faults in a running training: steps that must not count, replicas that differ, slow ranks."""
