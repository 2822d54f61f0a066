"""The place of the Triton kernels. Importing this package must be the first thing that imports triton."""
