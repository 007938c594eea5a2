"""Engines: what holds a model with its optimizer and takes the steps."""
