"""Engines, which hold a model with its optimizer and take the training steps."""
