"""Published KV-cache systems other than rules of partitions; settings name them by class path."""

from lrsa_lit.systems.adakv import AdaKV
from lrsa_lit.systems.cascade import Cascade
from lrsa_lit.systems.chunkkv import ChunkKV, ChunkKVPress
from lrsa_lit.systems.duo_attention import DuoAttention, gated_attention
from lrsa_lit.systems.expected_attention import ExpectedAttention
from lrsa_lit.systems.freqkv import FreqKV
from lrsa_lit.systems.key_scores import KeyDiff, KeyNorm, Random, StreamingLLM
from lrsa_lit.systems.keydiff_blocks import KeyDiffBlocks
from lrsa_lit.systems.kvzip import KVzip
from lrsa_lit.systems.lagkv_press import LagKVPress
from lrsa_lit.systems.one_shot import OneShot, Prompt
from lrsa_lit.systems.query_scores import TOVA, SnapKV
from lrsa_lit.systems.sparse_accelerate import SparseAccelerate
from lrsa_lit.systems.squeezed import SqueezedAttention
from lrsa_lit.systems.system import Head, Place, System

__all__ = [
    "TOVA",
    "AdaKV",
    "Cascade",
    "ChunkKV",
    "ChunkKVPress",
    "DuoAttention",
    "ExpectedAttention",
    "FreqKV",
    "Head",
    "KVzip",
    "KeyDiff",
    "KeyDiffBlocks",
    "KeyNorm",
    "LagKVPress",
    "OneShot",
    "Place",
    "Prompt",
    "Random",
    "SnapKV",
    "SparseAccelerate",
    "SqueezedAttention",
    "StreamingLLM",
    "System",
    "gated_attention",
]
