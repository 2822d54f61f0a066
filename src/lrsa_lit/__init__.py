"""Fine-tune and run LLMs with Lag-Relative Sparse Attention (arXiv 2506.11498) on PyTorch Lightning."""

__version__ = "0.1.0"
