"""Llama-shaped weights of Hugging Face's form, read and written."""
