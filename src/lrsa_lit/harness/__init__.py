"""Models with LRSA for lm-evaluation-harness (extra ``eval``)."""
