"""An OpenAI-compatible server: continuous batching over compressed caches, and reuse of prompts already read."""
