"""Collectives, channels between ranks, and the mesh whose axes they run over."""
