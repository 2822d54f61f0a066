"""Evaluation of answers: scores of single answers, averages, and statistics over questions."""
