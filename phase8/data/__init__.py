"""Data files, tokenizers, blending, the stateless sampler and the loader."""
