"""Code that is exported with the weights of a model, for transformers: plain PyTorch, without phase8."""
