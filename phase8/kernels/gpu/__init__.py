"""Triton kernels, imported only where they run, since a CPU installation of torch has no Triton."""
