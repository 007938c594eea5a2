"""Distributed pretraining of linear-time language models built from the Phase 8 block."""
