"""What scores and the run's own attention are called where they are shown."""

SCORES = {"loss": "answer loss", "f1": "F1", "em": "exact match"}
OWN = "LRSA"
"""The run's own attention, whose name among the evaluated ones is empty."""
