"""Published ways to keep less of the past that are no rule of partitions, by class path in settings."""

from lrsa_lit.systems.cascade import Cascade
from lrsa_lit.systems.freqkv import FreqKV
from lrsa_lit.systems.one_shot import KeyNorm, OneShot, Prompt, StreamingLLM
from lrsa_lit.systems.sparse_accelerate import SparseAccelerate
from lrsa_lit.systems.squeezed import SqueezedAttention
from lrsa_lit.systems.system import Place, System

__all__ = [
    "Cascade",
    "FreqKV",
    "KeyNorm",
    "OneShot",
    "Place",
    "Prompt",
    "SparseAccelerate",
    "SqueezedAttention",
    "StreamingLLM",
    "System",
]
