"""What a server counts, for Prometheus: in each of its processes, and shown as one.

Before this is imported, ``PROMETHEUS_MULTIPROC_DIR`` must name a folder that all processes share.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUESTS = Counter("lrsa_requests", "Chat completions by the status of their answer", ["status"])
PROMPT_TOKENS = Counter("lrsa_prompt_tokens", "Tokens of prompts that were answered")
CACHED_TOKENS = Counter("lrsa_cached_tokens", "Of these, tokens that a snapshot stood for")
COMPLETION_TOKENS = Counter("lrsa_completion_tokens", "Tokens of answers")
FIRST_TOKEN = Histogram("lrsa_first_token_seconds", "Seconds from a request to its first token", buckets=_SECONDS)
TOKEN = Histogram("lrsa_token_seconds", "Seconds between two tokens of an answer, its mean", buckets=_SECONDS)
WAITING = Gauge("lrsa_waiting", "Requests that wait for a worker", multiprocess_mode="mostrecent")
ROWS = Gauge("lrsa_rows", "Answers that are decoded together", multiprocess_mode="livesum")
READING = Gauge("lrsa_reading", "Prompts that are being read", multiprocess_mode="livesum")
RESERVED = Gauge("lrsa_reserved_bytes", "Bytes that admitted requests will hold at most", multiprocess_mode="livesum")
SNAPSHOTS = Gauge("lrsa_snapshot_bytes", "Bytes of snapshots", multiprocess_mode="livesum")
FORMAT = CONTENT_TYPE_LATEST


def shown() -> bytes:
    """The counts of all processes, in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)
