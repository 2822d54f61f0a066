"""Answers for many readers at once: rows that join and leave between tokens, and texts that are read once."""
