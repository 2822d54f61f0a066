"""Warp-specialised kernels for Hopper GPUs in Gluon, Triton's lower-level language; ``hopper`` is the entry point."""
