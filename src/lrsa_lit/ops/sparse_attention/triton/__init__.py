"""Triton kernels for CUDA devices, and for the CPU under Triton's interpreter; ``launch`` is the way in."""
