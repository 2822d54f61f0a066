"""What answers are worth: scores, the task's own one for a question, and statistics over questions."""
