"""Weights in the format of Hugging Face's transformers: Llamas, and models that bring their own code."""
