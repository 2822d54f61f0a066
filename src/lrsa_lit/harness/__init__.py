"""Models under a rule for lm-evaluation-harness (the extra ``eval``)."""
