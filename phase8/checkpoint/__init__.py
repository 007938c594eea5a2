"""Checkpoints: safetensors files and a JSON manifest, no pickle."""
