"""What a study's results say: tables with their statistics, plots, blocks of documents, frames for notebooks, MLflow.

Reads result lines and the study's file; nothing here trains or evaluates.
"""
