"""Base LLMs: where they come from and how they are loaded."""
