"""Reading and writing Llama-shaped weights in Hugging Face's format."""
