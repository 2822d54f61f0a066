"""Tasks: LightningModules that receive built parts."""

from lrsa_lit.tasks.question_answering import LongContextQA

__all__ = ["LongContextQA"]
