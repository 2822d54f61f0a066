"""Triton kernels for CUDA devices, and for the CPU in Triton's interpreter. ``launch`` is the entry point.

Dimensions: B batch, H key-value heads, Hq query heads, G = Hq / H, T tokens, P partitions, L lag_size, K top_k, M rows
of the compact buffer, D head_dim. ``device_functions`` explains the names in kernels.
"""
