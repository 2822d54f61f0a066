"""Operators: pure PyTorch, no transformers, no Lightning."""
