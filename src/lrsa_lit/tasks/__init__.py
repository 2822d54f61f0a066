"""Tasks: LightningModules, which receive their parts as objects."""

from lrsa_lit.tasks.digests import Digests
from lrsa_lit.tasks.head_gates import HeadGates
from lrsa_lit.tasks.question_answering import LongContextQA
from lrsa_lit.tasks.sentence_retrieval import SentenceRetrieval
from lrsa_lit.tasks.soco import SoCo
from lrsa_lit.tasks.top_k import AnnealedTopK, SampledTopK, TopKSchedule

__all__ = [
    "AnnealedTopK",
    "Digests",
    "HeadGates",
    "LongContextQA",
    "SampledTopK",
    "SentenceRetrieval",
    "SoCo",
    "TopKSchedule",
]
